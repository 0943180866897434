"""What the page draws, each into axes that it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cluster.fabric.report import units
from cluster.fabric.report.figures import FIGURE_HEIGHT, FULL, HALF, Drawing, Paint, drawing
from cluster.fabric.report.palette import Palette
from launcher.goodput import Start
from launcher.report.series import Curve, MetricSeries

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_STARTS = 40
_MOST_LAYERS = 8
_PARTS = (
    ("waiting for data", "data_s"),
    ("forward and backward", "compute_s"),
    ("update", "update_s"),
    ("saving", "save_s"),
)
_TIME_UNITS = ((86_400.0, "days"), (3_600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


@dataclass(frozen=True, kw_only=True)
class _Line:
    """One curve of a chart."""

    name: str
    curve: Curve
    factor: float = 1.0
    marker: bool = False
    """Whether its points are few, and marked."""


def learning(series: MetricSeries, starts: Sequence[Start]) -> list[Drawing]:
    """The loss in training and in validation."""
    lines = []
    if (loss := series.curve("loss")) is not None:
        lines.append(_Line(name="training", curve=loss))
    if (held_out := series.validation("val_loss")) is not None:
        lines.append(_Line(name="held out", curve=held_out, marker=True))
    if not lines:
        return []
    return [_chart("Loss", "nats a token, over steps", lines, name="loss", width=FULL, starts=starts, from_zero=False)]


def speed(series: MetricSeries, starts: Sequence[Start]) -> list[Drawing]:
    """Tokens a second; a step's time in its parts; memory; the balance of experts. The first step of each start, which may
    compile, is left out of the first two."""
    drawn = []
    firsts = [start.first_step for start in starts if start.first_step is not None]
    if (tokens := series.curve("tokens_per_s", without=firsts)) is not None:
        usual = series.usual("tokens_per_s") or 0.0
        note = f"tokens a second, over steps; the median of the newest is {usual:,.0f}"
        lines = [_Line(name="tokens/s", curve=tokens)]
        drawn.append(_chart("Throughput", note, lines, name="throughput", starts=starts, thousands=True))
    parts = [(name, curve) for name, key in _PARTS if (curve := series.curve(key, without=firsts)) is not None]
    if parts:
        drawn.append(_step_time(series, parts))
    if (memory := series.curve("memory_bytes")) is not None:
        lines = [_Line(name="memory", curve=memory, factor=2.0**-30)]
        note = f"GiB, the largest so far on the first rank; now {units.size(series.last('memory_bytes') or 0)}"
        drawn.append(_chart("Memory", note, lines, name="memory", starts=starts))
    if len(series.balances) > 1:
        drawn.append(_balance(series))
    return drawn


def history(starts: Sequence[Start], begin: float, end: float) -> list[Drawing]:
    """Each start as a bar over time; nothing where there is but one."""
    if len(starts) < 2:
        return []
    shown = starts[-MOST_STARTS:]
    scale, unit = next((scale, name) for scale, name in _TIME_UNITS if end - begin >= 2 * scale or scale == 1.0)

    def onto(axes: Axes, palette: Palette) -> None:
        for row, start in enumerate(shown):
            over = end if start.ended is None else start.ended
            ready = min(over, over if start.trained is None else start.trained)
            loading = ((start.began - begin) / scale, (ready - start.began) / scale)
            training = ((ready - begin) / scale, (over - ready) / scale)
            axes.broken_barh([loading], (row + 0.2, 0.6), facecolors=palette.warn, linewidth=0)
            axes.broken_barh([training], (row + 0.2, 0.6), facecolors=palette.good, linewidth=0)
        every = max(-(-len(shown) // 12), 1)
        axes.set_yticks(
            [row + 0.5 for row in range(0, len(shown), every)], [str(each.number) for each in shown[::every]]
        )
        axes.set_ylim(len(shown), 0)
        axes.set_xlim(0, max((end - begin) / scale, 1e-9))
        axes.tick_params(length=0, pad=5)
        axes.grid(axis="x", color=palette.line)
        axes.spines["left"].set_visible(False)

    left_out = f"; the first {len(starts) - len(shown)} are left out" if len(shown) < len(starts) else ""
    note = f"one row each, over {unit} since the beginning; amber until the first step has been made{left_out}"
    height = 50.0 + min(max(20.0 * len(shown), 60.0), 400.0)
    return [drawing("Starts", note, Paint(onto=onto), width=FULL, height=height, name="starts")]


def _chart(
    title: str,
    note: str,
    lines: Sequence[_Line],
    *,
    name: str,
    starts: Sequence[Start],
    width: float = HALF,
    from_zero: bool = True,
    thousands: bool = False,
) -> Drawing:
    def onto(axes: Axes, palette: Palette) -> None:
        _mark_starts(axes, starts, palette)
        for number, line in enumerate(lines):
            colour = palette.series[number]
            if line.curve.is_thinned:
                low, high = line.curve.low * line.factor, line.curve.high * line.factor
                axes.fill_between(line.curve.steps, low, high, color=colour, alpha=0.18, linewidth=0)
            marker = "o" if line.marker or len(line.curve.steps) == 1 else None
            mean = line.curve.mean * line.factor
            axes.plot(
                line.curve.steps, mean, color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=line.name
            )
        if len(lines) > 1:
            axes.legend(loc="upper right", handlelength=1.4, labelcolor=palette.muted)
        _finish(axes, palette, thousands=thousands)
        if from_zero:
            axes.set_ylim(0, _room([line.curve.mean * line.factor for line in lines]))

    margins = (56.0 if thousands else 40.0, 30.0, 6.0, 10.0)
    paint = Paint(onto=onto, margins=margins)
    return drawing(title, note, paint, width=width, height=FIGURE_HEIGHT, name=name)


def _step_time(series: MetricSeries, parts: Sequence[tuple[str, Curve]]) -> Drawing:
    usual = series.usual("step_time_s") or 0.0
    unit = units.time_unit([usual])
    steps = parts[0][1].steps
    heights = [np.interp(steps, curve.steps, curve.mean) * unit.factor for _, curve in parts]

    def onto(axes: Axes, palette: Palette) -> None:
        colours = [palette.series[number] for number in (1, 0, 3, 2)]
        axes.stackplot(
            steps, heights, colors=colours[: len(parts)], labels=[name for name, _ in parts], alpha=0.85, linewidth=0
        )
        axes.legend(loc="upper right", ncols=2, handlelength=1.0, labelcolor=palette.muted)
        _finish(axes, palette)
        axes.set_ylim(0, 1.3 * _room([np.sum(heights, axis=0)]))

    note = f"{unit.name}, in its parts; the median of the newest is {units.seconds(usual)}"
    return drawing("Step time", note, Paint(onto=onto), width=HALF, height=FIGURE_HEIGHT, name="step-time")


def _balance(series: MetricSeries) -> Drawing:
    layers = min(len(balance) for _, balance in series.balances)
    steps = np.array([step for step, _ in series.balances], dtype=np.float64)
    values_SL = np.array([balance[:layers] for _, balance in series.balances])

    def onto(axes: Axes, palette: Palette) -> None:
        if layers <= _MOST_LAYERS:
            for layer in range(layers):
                axes.plot(
                    steps, values_SL[:, layer], color=palette.series[layer], linewidth=1.4, label=f"layer {layer}"
                )
            axes.legend(loc="lower right", ncols=3, handlelength=1.2, labelcolor=palette.muted)
        else:
            low, high = values_SL.min(axis=1), values_SL.max(axis=1)
            axes.fill_between(steps, low, high, color=palette.series[0], alpha=0.18, linewidth=0)
            axes.plot(steps, np.median(values_SL, axis=1), color=palette.series[0], linewidth=1.6)
        _finish(axes, palette)
        axes.set_ylim(max(0.0, float(values_SL.min()) - 0.1), 1.02)

    which = "a line a layer" if layers <= _MOST_LAYERS else f"the median of {layers} layers, and all between"
    note = f"entropy of the experts' load, 1 is perfect balance; {which}"
    return drawing("Balance of experts", note, Paint(onto=onto), width=HALF, height=FIGURE_HEIGHT, name="experts")


def _mark_starts(axes: Axes, starts: Sequence[Start], palette: Palette) -> None:
    firsts = [start.first_step for start in starts[1:] if start.first_step is not None]
    for step in firsts[-MOST_STARTS:]:
        axes.axvline(step, color=palette.quiet, linewidth=0.9, linestyle=(0, (1, 2)))


def _finish(axes: Axes, palette: Palette, *, thousands: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    number: Callable[[float, int], str] = lambda value, place: f"{value:,.0f}"  # noqa: E731
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(number))
    if thousands:
        axes.yaxis.set_major_formatter(FuncFormatter(number))
    axes.grid(axis="y", color=palette.line)
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0, pad=5)


def _room(curves: Sequence[np.ndarray]) -> float:
    """Up to where an axis goes: a first step that compiles must not make all others flat."""
    top = max(float(np.percentile(curve, 98)) for curve in curves)
    return 1.15 * top if top > 0 else 1.0
