"""The overview: one picture with the verdict and the drawings that there are data for."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.fabric.report import drawings
from cluster.fabric.report.canvas import png
from cluster.fabric.report.data import ReportData
from cluster.fabric.report.palette import Palette
from cluster.fabric.report.topology import HEIGHT, topology, topology_note
from cluster.fabric.report.views import (
    Curve,
    compute_of,
    curves_of,
    fabric_of,
    findings_of,
    hosts_of_kind,
    named_hosts,
    pairs_of,
    waits_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 1240.0
_MARGIN, _GAP = 40.0, 44.0
_TITLE, _LINE, _LEADING = 96.0, 21.0, 8.0
_PANEL_TITLE = 62.0
_MOST_FINDINGS = 4
_MOST_CHARACTERS = 180


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """One drawing; sizes in pixels."""

    title: str
    note: str
    draw: Callable[[Axes, Palette, float], None]
    """With the width of its axes."""
    height: float = 250.0
    share: float = 1.0
    """Of the row's width, against its neighbours."""
    left: float = 34.0
    """Room for labels of the axes."""
    top: float = 0.0
    bottom: float = 34.0


def overview(data: ReportData) -> bytes:
    """The picture as PNG. Raises FabricError where matplotlib is missing."""
    lines = _lines(data)
    rows = _rows(data)
    head = _TITLE + (_LINE * len(lines) + _LEADING * sum(first for _, first in lines) + 10 if lines else 0)
    height = head + sum(_PANEL_TITLE + max(panel.height for panel in row) for row in rows) + 16

    def draw(figure: Figure, palette: Palette) -> None:
        _head(figure, data, lines, palette, height)
        top = head
        for row in rows:
            room = _WIDTH - 2 * _MARGIN - _GAP * (len(row) - 1)
            left = _MARGIN
            for panel in row:
                width = room * panel.share / sum(each.share for each in row)
                _panel(figure, panel, palette, left=left, top=top, width=width, total=height)
                left += width + _GAP
            top += _PANEL_TITLE + max(panel.height for panel in row)

    return png(draw, width=_WIDTH, height=height)


def _lines(data: ReportData) -> list[tuple[str, bool]]:
    """Of the findings' sentences, and whether a finding begins there."""
    findings = findings_of(data.verdict)
    lines = []
    for finding in findings[:_MOST_FINDINGS]:
        wrapped = textwrap.wrap(finding.sentence, _MOST_CHARACTERS)
        lines += [(line, number == 0) for number, line in enumerate(wrapped)]
    if len(findings) > _MOST_FINDINGS:
        lines.append((f"and {len(findings) - _MOST_FINDINGS} more", True))
    return lines


def _head(figure: Figure, data: ReportData, lines: Sequence[tuple[str, bool]], palette: Palette, height: float) -> None:
    def write(left: float, top: float, text: str, **style: Any) -> None:
        figure.text(left / _WIDTH, 1 - top / height, text, va="baseline", **style)

    write(_MARGIN, 46, data.title, fontsize=20, fontweight="bold")
    write(_MARGIN, 68, data.subtitle, fontsize=11, color=palette.muted)
    if data.verdict is not None:
        count = len(findings_of(data.verdict))
        said = f"{count} finding{'s' if count > 1 else ''}" if count else "healthy"
        colour = palette.bad if count else palette.good
        write(
            _WIDTH - _MARGIN - 12,
            46,
            said,
            ha="right",
            fontsize=12,
            fontweight="bold",
            color=palette.ground,
            bbox={"boxstyle": "round,pad=0.55,rounding_size=0.9", "facecolor": colour, "edgecolor": "none"},
        )
    top = _TITLE + 4
    for line, first in lines:
        top += _LEADING if first else 0
        if first:
            write(_MARGIN, top + 6, "●", fontsize=9, color=palette.bad)
        write(_MARGIN + 18, top + 6, line, fontsize=11)
        top += _LINE


def _panel(
    figure: Figure, panel: _Panel, palette: Palette, *, left: float, top: float, width: float, total: float
) -> None:
    figure.text(left / _WIDTH, 1 - (top + 24) / total, panel.title, fontsize=12.5, fontweight="bold", va="baseline")
    figure.text(left / _WIDTH, 1 - (top + 42) / total, panel.note, fontsize=9, color=palette.muted, va="baseline")
    inner = width - panel.left
    bottom = top + _PANEL_TITLE + panel.height - panel.bottom
    axes = figure.add_axes(
        (
            (left + panel.left) / _WIDTH,
            1 - bottom / total,
            inner / _WIDTH,
            (panel.height - panel.bottom - panel.top) / total,
        )
    )
    axes.set_facecolor("none")
    panel.draw(axes, palette, inner)


def _rows(data: ReportData) -> list[list[_Panel]]:
    """The topology beside the pairs; then the rest, three in a row."""
    first = []
    if fabric := fabric_of(data.verdict):
        first.append(
            _Panel(
                title="Topology",
                note=topology_note(fabric),
                draw=lambda axes, palette, width: topology(axes, fabric, palette, width=width),
                height=HEIGHT,
                share=1.9,
                left=0,
                bottom=0,
            )
        )
    if pairs := pairs_of(data.verdict):
        named = named_hosts(data.verdict)
        left, above = drawings.pairs_margins(pairs)
        first.append(
            _Panel(
                title="Pairs of hosts",
                note=drawings.pairs_note(pairs),
                draw=lambda axes, palette, _: drawings.pairs(axes, pairs, palette, named=named),
                height=HEIGHT,
                left=left,
                top=above,
                bottom=6,
            )
        )
    rest = _curve_panels(data)
    if times := compute_of(data.verdict):
        slow = hosts_of_kind(data.verdict, "slow_host")
        rest.append(
            _Panel(
                title="Compute",
                note=drawings.compute_note(times),
                draw=lambda axes, palette, _: drawings.compute(axes, times, palette, slow=slow),
            )
        )
    if timeline := waits_of(data.waits, data.verdict):
        rest.append(
            _Panel(
                title="Waits in training",
                note=drawings.waits_note(timeline),
                draw=lambda axes, palette, _: drawings.waits(axes, timeline, palette),
            )
        )
        if timeline.ranks:
            rest.append(
                _Panel(
                    title="Who is late",
                    note=drawings.late_note(timeline),
                    draw=lambda axes, palette, _: drawings.late(axes, timeline, palette),
                )
            )
    return [row for row in (first, *(rest[place : place + 3] for place in range(0, len(rest), 3))) if row]


def _curve_panels(data: ReportData) -> list[_Panel]:
    groups = curves_of(data.sweep)
    kinds = drawings.kinds_of(groups)

    def draw(group: Sequence[Curve]) -> Callable[[Axes, Palette, float], None]:
        def onto(axes: Axes, palette: Palette, width: float) -> None:
            drawings.curves(axes, group, palette, kinds=kinds)
            axes.legend(loc="upper left", handlelength=1.4, labelcolor=palette.muted)

        return onto

    return [
        _Panel(title=f"Bandwidth, {name}", note=drawings.curves_note(group), draw=draw(group))
        for name, group in list(groups.items())[:3]
    ]
