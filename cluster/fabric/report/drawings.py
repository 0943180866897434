"""Bandwidth curves, the pair matrix, compute times and waits, each into axes that it is given, and a note of its units."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.fabric.report import units
from cluster.fabric.report.palette import Palette
from cluster.fabric.report.views import HEAT_STEPS, MOST_HOSTS, Curve, Pairs, Waits, medians, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_WITH_NUMBERS = 12
_MODES = {"isolated": "solid", "together": (0, (4, 2)), "with_compute": (0, (1, 1.6))}
_DASHES = {"isolated": "solid", "together": "dashed", "with_compute": "dotted"}


def curves(axes: Axes, group: Sequence[Curve], palette: Palette, *, kinds: Sequence[str]) -> None:
    """Bus bandwidth over size, both logarithmic in size; a colour a kind (in the order of `kinds`), a dash a mode."""
    unit = _curve_unit(group)
    for curve in group:
        colour = palette.series[kinds.index(curve.kind) % len(palette.series)]
        axes.plot(
            curve.sizes,
            [rate * unit.factor for rate in curve.busbw],
            color=colour,
            linestyle=_MODES.get(curve.mode, "solid"),
            linewidth=1.8,
            marker="o",
            markersize=3.2,
            label=curve.kind if curve.mode == group[0].mode else None,
        )
    axes.set_xscale("log", base=2)
    sizes = sorted({size for curve in group for size in curve.sizes})
    ticks = sizes[:: max(-(-len(sizes) // 6), 1)]
    axes.set_xticks(ticks, [units.size(size) for size in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    _grid(axes, palette)


def curves_note(group: Sequence[Curve]) -> str:
    """`bus bandwidth in GB/s over size; isolated solid, together dashed`."""
    modes = [mode for mode in _MODES if any(curve.mode == mode for curve in group)]
    legend = ", ".join(f"{mode.replace('_', ' ')} {_DASHES[mode]}" for mode in modes)
    return f"bus bandwidth in {_curve_unit(group).name} over size" + (f"; {legend}" if len(modes) > 1 else "")


def _curve_unit(group: Sequence[Curve]) -> units.Unit:
    return units.byte_rates(max(curve.busbw) for curve in group)


def kinds_of(groups: Mapping[str, Sequence[Curve]]) -> list[str]:
    """Kinds of collectives in all groups, each once: the order of their colours."""
    return list(dict.fromkeys(curve.kind for group in groups.values() for curve in group))


def pairs_note(pairs: Pairs) -> str:
    """Its unit, and how to read it."""
    unit = units.bit_rates([pairs.median])
    median = f"{unit.show(pairs.median)} {unit.name}"
    if len(pairs.names) > MOST_HOSTS:
        return f"medians of each host's measured pairs, in % of the median of all, {median}"
    return f"{unit.name}, row sends to column, median {unit.show(pairs.median)}; the redder the slower"


def pairs_margins(pairs: Pairs) -> tuple[float, float]:
    """Room in pixels that names need to the left of the matrix and above it."""
    if len(pairs.names) > MOST_HOSTS:
        return 40.0, 8.0
    longest = 6.2 * max(map(len, short_names(pairs.names).values()))
    return longest + 14, (longest if _is_crowded(pairs) else 8) + 16


def pairs(axes: Axes, measured: Pairs, palette: Palette, *, named: Collection[str]) -> None:
    """The pair matrix or, of a large fabric, each host's medians; `named` hosts of findings have their names there."""
    if len(measured.names) > MOST_HOSTS:
        _medians(axes, measured, palette, named=named)
    else:
        _matrix(axes, measured, palette)


def _is_crowded(pairs: Pairs) -> bool:
    return len(pairs.names) > _MOST_WITH_NUMBERS or max(map(len, short_names(pairs.names).values())) > 6


def _matrix(axes: Axes, pairs: Pairs, palette: Palette) -> None:
    names, steps = short_names(pairs.names), pairs.heat()
    count = len(pairs.names)
    unit = units.bit_rates([pairs.median])
    seam = 0.02 if count <= 24 else 0.0
    for row in range(count):
        for step in range(len(palette.heat)):
            cells = [(column + seam, 1 - 2 * seam) for column in range(count) if steps[row, column] == step]
            if cells:
                axes.broken_barh(cells, (row + seam, 1 - 2 * seam), facecolors=palette.heat[step], linewidth=0)
        if count <= _MOST_WITH_NUMBERS:
            for column in np.flatnonzero(steps[row] >= 0):
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    unit.show(float(pairs.rates[row, column])),
                    color=palette.heat_ink[steps[row, column]],
                    ha="center",
                    va="center",
                    fontsize=8.5,
                )
    axes.set_xlim(0, count)
    axes.set_ylim(count, 0)
    axes.set_aspect("equal", anchor="NW")
    places = range(0, count, max(-(-count // 24), 1))
    labels = [names[pairs.names[place]] for place in places]
    upright: dict[str, Any] = {}
    if _is_crowded(pairs):
        upright = {"rotation": 90, "rotation_mode": "anchor", "ha": "left", "va": "center"}
    axes.xaxis.tick_top()
    axes.set_xticks([place + 0.5 for place in places], labels, **upright)
    axes.set_yticks([place + 0.5 for place in places], labels)
    axes.tick_params(length=0, pad=4)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _medians(axes: Axes, pairs: Pairs, palette: Palette, *, named: Collection[str]) -> None:
    names, places = short_names(pairs.names), np.arange(len(pairs.names))
    for way, rates, marker, colour in (
        ("sends", pairs.rates, "^", palette.series[0]),
        ("receives", pairs.rates.T, "v", palette.series[1]),
    ):
        shares = 100 * medians(rates) / pairs.median
        axes.scatter(places, shares, marker=marker, s=9, color=colour, linewidths=0, label=way)
        for place in places:
            if pairs.names[place] in named and shares[place] < 100 * HEAT_STEPS[0]:
                axes.annotate(
                    names[pairs.names[place]],
                    (place, shares[place]),
                    xytext=(0, -11),
                    textcoords="offset points",
                    color=palette.bad,
                    ha="center",
                    fontsize=9,
                )
    axes.set_ylim(0, 118)
    axes.set_xlim(-0.02 * len(places), 1.02 * len(places))
    axes.set_xticks([])
    axes.legend(loc="lower left", ncols=2, handletextpad=0.2, labelcolor=palette.muted)
    _grid(axes, palette)


def compute_note(times: Mapping[str, float]) -> str:
    """Its unit."""
    return f"time of the same work, in % above the median of {units.seconds(float(np.median(list(times.values()))))}"


def compute(axes: Axes, times: Mapping[str, float], palette: Palette, *, slow: Collection[str]) -> None:
    """Time of the same piece of work on each host, against the median; hosts found slow in another colour."""
    names, median = short_names(list(times)), float(np.median(list(times.values())))
    shares = [100 * (seconds / median - 1) for seconds in times.values()]
    places = np.arange(len(times))
    colours = [palette.bad if host in slow else palette.series[0] for host in times]
    axes.axhline(0, color=palette.quiet, linewidth=1)
    if len(times) <= 64:
        axes.vlines(places, 0, shares, colors=colours, linewidth=2)
    axes.scatter(places, shares, c=colours, s=34 if len(times) <= 64 else 8, zorder=3, linewidths=0)
    for place, host in enumerate(times):
        if host in slow:
            axes.annotate(
                f"{names[host]}  {shares[place]:+.0f} %",
                (place, shares[place]),
                xytext=(0, 7),
                textcoords="offset points",
                color=palette.bad,
                ha="center",
                fontsize=9,
            )
    every = max(-(-len(times) // 8), 1)
    axes.set_xticks(places[::every], [names[host] for host in list(times)[::every]])
    reach = max(max(shares), 5.0)
    axes.set_ylim(min(min(shares), -0.25 * reach) - 0.1 * reach, 1.25 * reach)
    axes.set_xlim(-0.6, len(times) - 0.4)
    _grid(axes, palette)


def waits_note(timeline: Waits) -> str:
    """Its unit, and how to read it."""
    network = "; dashed: the collectives alone, nobody late" if timeline.network else ""
    return f"{_wait_unit(timeline).name} that ranks stand still in a step, by axis{network}"


def _wait_unit(timeline: Waits) -> units.Unit:
    series = (*timeline.by_axis.values(), *timeline.network.values())
    return units.time_unit(value for values in series for value in values)


def waits(axes: Axes, timeline: Waits, palette: Palette) -> None:
    """What ranks stood still for, by axis, over the steps of a run."""
    unit = _wait_unit(timeline)
    for number, (axis, values) in enumerate(timeline.by_axis.items()):
        colour = palette.series[number % len(palette.series)]
        axes.plot(timeline.steps, [value * unit.factor for value in values], color=colour, linewidth=1.8, label=axis)
        if floor := timeline.network.get(axis):
            shown = [value * unit.factor for value in floor]
            axes.plot(timeline.steps, shown, color=colour, linewidth=1.2, linestyle=_MODES["together"])
    axes.legend(loc="upper left", ncols=4, handlelength=1.4, labelcolor=palette.muted)
    axes.margins(x=0.01, y=0.3)
    axes.set_ylim(bottom=0)
    for step, whom in timeline.onsets:
        axes.axvline(step, color=palette.bad, linewidth=1.2, linestyle=_MODES["with_compute"])
        axes.annotate(
            f"{whom} since step {step:,}",
            (step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(6, -4) if step <= (timeline.steps[0] + timeline.steps[-1]) / 2 else (-6, -4),
            textcoords="offset points",
            color=palette.bad,
            ha="left" if step <= (timeline.steps[0] + timeline.steps[-1]) / 2 else "right",
            va="top",
            fontsize=9,
        )
    _grid(axes, palette)


def late_note(timeline: Waits) -> str:
    """How to read it."""
    return f"for which rank the others wait, over the steps; the reddest is {units.seconds(np.nanmax(timeline.late))} a step"


def late(axes: Axes, timeline: Waits, palette: Palette) -> None:
    """For whom the others waited: a row a rank, a column a recorded step, the darker the longer."""
    greatest = float(np.nanmax(timeline.late)) or 1.0
    most = len(palette.heat) - 1
    edges = _edges(timeline.steps)
    for row, values in enumerate(timeline.late):
        steps = [-1 if np.isnan(value) else round(most * value / greatest) for value in values]
        place = 0
        # Neighbours of one colour are one bar, without seams.
        for step, run in groupby(steps):
            end = place + len(list(run))
            if step >= 0:
                bar = (edges[place], edges[end] - edges[place])
                axes.broken_barh([bar], (row + 0.04, 0.92), facecolors=palette.heat[step], linewidth=0)
            place = end
    every = max(-(-len(timeline.ranks) // 16), 1)
    rows = range(0, len(timeline.ranks), every)
    axes.set_yticks([row + 0.5 for row in rows], [str(timeline.ranks[row]) for row in rows])
    axes.set_ylim(len(timeline.ranks), 0)
    axes.set_xlim(edges[0], edges[-1])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _edges(steps: Sequence[int]) -> list[float]:
    """Half way between neighbours, and as far beyond the first and the last."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(one + other) / 2 for one, other in pairwise(steps)]
    return [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]


def _grid(axes: Axes, palette: Palette) -> None:
    axes.grid(axis="y", color=palette.line)
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0, pad=5)
