"""The colours of a report, on light and on dark ground.

Drawings are made once, with placeholders for colours; the page gives them its own by CSS variables, a picture by these.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Names say what a colour is for."""

    ground: str
    panel: str
    ink: str
    muted: str
    line: str
    quiet: str
    """Of links and boxes that nothing is said of."""
    bad: str
    warn: str
    good: str
    series: tuple[str, ...]
    """Of curves, told apart by readers who see colours differently, too (after Okabe and Ito, 2008)."""
    heat: tuple[str, ...]
    """From as fast as the median to very slow."""
    heat_ink: tuple[str, ...]
    """Of a number on each of them."""


LIGHT = Palette(
    ground="#ffffff",
    panel="#f5f7f9",
    ink="#1c2329",
    muted="#5b6772",
    line="#dde3e8",
    quiet="#a9b4be",
    bad="#cb2431",
    warn="#b45f06",
    good="#1a7f4b",
    series=("#1f6fc4", "#d3720b", "#0c8f7d", "#8e4ec6", "#c2376f", "#6b7a12", "#4b5a68", "#a3582a"),
    heat=("#e4eef2", "#edeed6", "#f7e3a6", "#f3bd6b", "#e58643", "#cc4b30", "#8f1d2c"),
    heat_ink=("#41505c", "#41505c", "#4a3c12", "#4a2f08", "#35160a", "#ffffff", "#ffffff"),
)
DARK = Palette(
    ground="#12171c",
    panel="#1a2128",
    ink="#e8edf1",
    muted="#98a5b1",
    line="#2b353e",
    quiet="#56636f",
    bad="#ff6b6b",
    warn="#f0a44b",
    good="#4cc38a",
    series=("#5aa9f5", "#f09a3e", "#3cc4ae", "#b98af0", "#f07fb0", "#b3c24a", "#9fb0bf", "#d59468"),
    heat=("#1f2f38", "#2b3d35", "#5a4b1d", "#7f5618", "#a8561f", "#cf4a35", "#ff5964"),
    heat_ink=("#a9bac6", "#b3c4b8", "#f2e2b0", "#f7e0b8", "#ffe9da", "#ffffff", "#1c0a0c"),
)


def named_colours(palette: Palette) -> dict[str, str]:
    """Each colour under its name as a CSS variable, such as `--ink` or `--heat-3`."""
    names: dict[str, str] = {}
    for field in fields(palette):
        value = getattr(palette, field.name)
        name = f"--{field.name.replace('_', '-')}"
        names |= {name: value} if isinstance(value, str) else {f"{name}-{n}": colour for n, colour in enumerate(value)}
    return names


def placeholders() -> tuple[Palette, dict[str, str]]:
    """A palette of colours that no drawing has by chance, and the CSS variable that each stands for."""
    names = list(named_colours(LIGHT))
    colours = {name: f"#fe01{number:02x}" for number, name in enumerate(names)}

    def of(field: str) -> str | tuple[str, ...]:
        name = f"--{field.replace('_', '-')}"
        return colours.get(name) or tuple(colours[each] for each in names if each.rpartition("-")[0] == name)

    palette = Palette(**{field.name: of(field.name) for field in fields(Palette)})  # type: ignore[arg-type]
    return palette, {colour: f"var({name})" for name, colour in colours.items()}
