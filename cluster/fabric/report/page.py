"""The report as files: the one place that knows jinja2."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from cluster.fabric.report import drawings
from cluster.fabric.report.canvas import svg
from cluster.fabric.report.data import ReportData
from cluster.fabric.report.overview import overview
from cluster.fabric.report.palette import DARK, LIGHT, Palette, named_colours
from cluster.fabric.report.tables import (
    counter_table,
    findings_list,
    fit_table,
    key_figures,
    made_of,
    prediction_table,
    wrong_data,
)
from cluster.fabric.report.topology import HEIGHT, topology, topology_note
from cluster.fabric.report.views import (
    Curve,
    compute_of,
    curves_of,
    fabric_of,
    hosts_of_kind,
    named_hosts,
    pairs_of,
    waits_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TEMPLATE = Path(__file__).with_name("template.html")
_FULL, _HALF = 866.0, 416.0  # a page shows them a fifth larger
_FIGURE_HEIGHT = 220.0


@dataclass(frozen=True, kw_only=True)
class _Drawing:
    """One figure of the page."""

    title: str
    note: str
    svg: str
    width: float


@dataclass(frozen=True, kw_only=True)
class _Paint:
    """What draws into axes, and the room around them in pixels: left, bottom, right, top."""

    onto: Callable[[Axes, Palette], None]
    margins: tuple[float, float, float, float] = (40.0, 30.0, 6.0, 10.0)


def write_report(data: ReportData, path: Path, *, png: Path | None = None) -> None:
    """Writes one HTML file that needs nothing else: no network, no other file. With `png` also a picture of the overview.

    Each is written as a whole or not at all. Raises FabricError where matplotlib is missing (extra `report`).
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(_contents(data))
    picture = None if png is None else overview(data)
    _replace(path, page.encode())
    if png is not None and picture is not None:
        _replace(png, picture)


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _contents(data: ReportData) -> dict[str, Any]:
    """Everything that the template names."""
    return {
        "title": data.title,
        "subtitle": data.subtitle,
        "light": named_colours(LIGHT),
        "dark": named_colours(DARK),
        "has_verdict": data.verdict is not None,
        "findings": findings_list(data.verdict),
        "figures": key_figures(data.verdict, data.sweep),
        "fabric": _fabric_drawings(data),
        "bandwidth": _bandwidth_drawings(data),
        "kinds": drawings.kinds_of(curves_of(data.sweep)),
        "fits": fit_table(data.sweep),
        "wrong": wrong_data(data.sweep),
        "waits": _wait_drawings(data),
        "predictions": prediction_table(data.predictions),
        "baseline": data.baseline,
        "counters": counter_table(data.counters or (data.verdict or {}).get("details", {}).get("counters")),
        "made_of": made_of(data.sweep),
    }


def _drawing(title: str, note: str, paint: _Paint, *, width: float, height: float, name: str) -> _Drawing:
    def draw(figure: Figure, palette: Palette) -> None:
        left, bottom, right, top = paint.margins
        axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))
        axes.set_facecolor("none")
        paint.onto(axes, palette)

    drawn = svg(draw, width=width, height=height, name=name, label=f"{title}: {note}")
    return _Drawing(title=title, note=note, svg=drawn, width=width)


def _fabric_drawings(data: ReportData) -> list[_Drawing]:
    drawn = []
    if fabric := fabric_of(data.verdict):
        paint = _Paint(onto=lambda axes, palette: topology(axes, fabric, palette, width=_FULL), margins=(0, 0, 0, 0))
        drawn.append(_drawing("Topology", topology_note(fabric), paint, width=_FULL, height=HEIGHT, name="topology"))
    if pairs := pairs_of(data.verdict):
        named = named_hosts(data.verdict)
        left, above = drawings.pairs_margins(pairs)
        paint = _Paint(
            onto=lambda axes, palette: drawings.pairs(axes, pairs, palette, named=named), margins=(left, 4, 4, above)
        )
        drawn.append(
            _drawing("Pairs of hosts", drawings.pairs_note(pairs), paint, width=_HALF, height=_HALF - 22, name="pairs")
        )
    if times := compute_of(data.verdict):
        slow = hosts_of_kind(data.verdict, "slow_host")
        paint = _Paint(onto=lambda axes, palette: drawings.compute(axes, times, palette, slow=slow))
        drawn.append(
            _drawing("Compute", drawings.compute_note(times), paint, width=_HALF, height=_HALF - 22, name="compute")
        )
    return drawn


def _bandwidth_drawings(data: ReportData) -> list[_Drawing]:
    groups = curves_of(data.sweep)
    kinds = drawings.kinds_of(groups)
    drawn = []
    for number, (name, group) in enumerate(groups.items()):

        def onto(axes: Axes, palette: Palette, group: Sequence[Curve] = group) -> None:
            drawings.curves(axes, group, palette, kinds=kinds)

        note = drawings.curves_note(group)
        drawn.append(
            _drawing(name, note, _Paint(onto=onto), width=_HALF, height=_FIGURE_HEIGHT, name=f"curves{number}")
        )
    return drawn


def _wait_drawings(data: ReportData) -> list[_Drawing]:
    timeline = waits_of(data.waits, data.verdict)
    if timeline is None:
        return []
    paint = _Paint(onto=lambda axes, palette: drawings.waits(axes, timeline, palette))
    note = drawings.waits_note(timeline)
    drawn = [_drawing("By axis", note, paint, width=_FULL, height=_FIGURE_HEIGHT, name="waits")]
    if timeline.ranks:
        paint = _Paint(onto=lambda axes, palette: drawings.late(axes, timeline, palette))
        height = 60.0 + min(max(18.0 * len(timeline.ranks), 80.0), 400.0)
        drawn.append(
            _drawing("Who is late", drawings.late_note(timeline), paint, width=_FULL, height=height, name="late")
        )
    return drawn
