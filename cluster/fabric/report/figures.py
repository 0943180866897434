"""Figures of a page, and pages as files: the one place that knows jinja2. Whoever lays a page of its own over the template of
this folder (`{% extends "template.html" %}`) has its style, and its macros `drawn`, `tabled`, `found` and `numbers`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from cluster.fabric.report.canvas import svg
from cluster.fabric.report.palette import DARK, LIGHT, Palette, named_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("template.html")
FULL, HALF = 866.0, 416.0
"""Widths in pixels; a page shows them a fifth larger."""
FIGURE_HEIGHT = 220.0


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One figure of the page."""

    title: str
    note: str
    svg: str
    width: float


@dataclass(frozen=True, kw_only=True)
class Paint:
    """What draws into axes, and the room around them in pixels: left, bottom, right, top."""

    onto: Callable[[Axes, Palette], None]
    margins: tuple[float, float, float, float] = (40.0, 30.0, 6.0, 10.0)


def drawing(title: str, note: str, paint: Paint, *, width: float, height: float, name: str) -> Drawing:
    """Draws a figure; `name` makes its ids unique within the page. Raises FabricError where matplotlib is missing."""

    def draw(figure: Figure, palette: Palette) -> None:
        left, bottom, right, top = paint.margins
        axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))
        axes.set_facecolor("none")
        paint.onto(axes, palette)

    drawn = svg(draw, width=width, height=height, name=name, label=f"{title}: {note}")
    return Drawing(title=title, note=note, svg=drawn, width=width)


def render(template: Path, contents: Mapping[str, Any]) -> str:
    """The page that `template` makes of `contents`, and of the colours."""
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATE.parent]),
    )
    colours = {"light": named_colours(LIGHT), "dark": named_colours(DARK)}
    return environment.get_template(template.name).render(**colours, **contents)


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file as a whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
