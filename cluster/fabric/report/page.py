"""The report as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.fabric.report import drawings
from cluster.fabric.report.data import Plain, ReportData
from cluster.fabric.report.figures import (
    FIGURE_HEIGHT,
    FULL,
    HALF,
    TEMPLATE,
    Drawing,
    Paint,
    drawing,
    render,
    replace_file,
)
from cluster.fabric.report.overview import overview
from cluster.fabric.report.palette import Palette
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


def write_report(data: ReportData, path: Path, *, png: Path | None = None) -> None:
    """Writes one HTML file that needs nothing else: no network, no other file. With `png` also a picture of the overview.

    Each is written as a whole or not at all. Raises FabricError where matplotlib is missing (extra `report`).
    """
    page = render(TEMPLATE, _contents(data))
    picture = None if png is None else overview(data)
    replace_file(path, page.encode())
    if png is not None and picture is not None:
        replace_file(png, picture)


def _contents(data: ReportData) -> dict[str, Any]:
    """Everything that the template names."""
    return {
        "title": data.title,
        "subtitle": data.subtitle,
        "has_verdict": data.verdict is not None,
        "findings": findings_list(data.verdict),
        "figures": key_figures(data.verdict, data.sweep),
        "fabric": _fabric_drawings(data),
        "bandwidth": _bandwidth_drawings(data),
        "kinds": drawings.kinds_of(curves_of(data.sweep)),
        "fits": fit_table(data.sweep),
        "wrong": wrong_data(data.sweep),
        "waits": wait_drawings(data.waits, data.verdict),
        "predictions": prediction_table(data.predictions),
        "baseline": data.baseline,
        "counters": counter_table(data.counters or (data.verdict or {}).get("details", {}).get("counters")),
        "made_of": made_of(data.sweep),
    }


def _fabric_drawings(data: ReportData) -> list[Drawing]:
    drawn = []
    if fabric := fabric_of(data.verdict):
        paint = Paint(onto=lambda axes, palette: topology(axes, fabric, palette, width=FULL), margins=(0, 0, 0, 0))
        drawn.append(drawing("Topology", topology_note(fabric), paint, width=FULL, height=HEIGHT, name="topology"))
    if pairs := pairs_of(data.verdict):
        named = named_hosts(data.verdict)
        left, above = drawings.pairs_margins(pairs)
        paint = Paint(
            onto=lambda axes, palette: drawings.pairs(axes, pairs, palette, named=named), margins=(left, 4, 4, above)
        )
        drawn.append(
            drawing("Pairs of hosts", drawings.pairs_note(pairs), paint, width=HALF, height=HALF - 22, name="pairs")
        )
    if times := compute_of(data.verdict):
        slow = hosts_of_kind(data.verdict, "slow_host")
        paint = Paint(onto=lambda axes, palette: drawings.compute(axes, times, palette, slow=slow))
        drawn.append(
            drawing("Compute", drawings.compute_note(times), paint, width=HALF, height=HALF - 22, name="compute")
        )
    return drawn


def _bandwidth_drawings(data: ReportData) -> list[Drawing]:
    groups = curves_of(data.sweep)
    kinds = drawings.kinds_of(groups)
    drawn = []
    for number, (name, group) in enumerate(groups.items()):

        def onto(axes: Axes, palette: Palette, group: Sequence[Curve] = group) -> None:
            drawings.curves(axes, group, palette, kinds=kinds)

        note = drawings.curves_note(group)
        drawn.append(drawing(name, note, Paint(onto=onto), width=HALF, height=FIGURE_HEIGHT, name=f"curves{number}"))
    return drawn


def wait_drawings(waits: Sequence[Plain], verdict: Plain | None) -> list[Drawing]:
    """Of the monitor's records: what ranks stood still for, and which of them was late."""
    timeline = waits_of(waits, verdict)
    if timeline is None:
        return []
    paint = Paint(onto=lambda axes, palette: drawings.waits(axes, timeline, palette))
    note = drawings.waits_note(timeline)
    drawn = [drawing("By axis", note, paint, width=FULL, height=FIGURE_HEIGHT, name="waits")]
    if timeline.ranks:
        paint = Paint(onto=lambda axes, palette: drawings.late(axes, timeline, palette))
        height = 60.0 + min(max(18.0 * len(timeline.ranks), 80.0), 400.0)
        drawn.append(
            drawing("Who is late", drawings.late_note(timeline), paint, width=FULL, height=height, name="late")
        )
    return drawn
