"""The pair matrix as text, for terminals that show nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.fabric.report import units
from cluster.fabric.report.views import HEAT_STEPS, Pairs, short_names, slowest_part

Matrix = Sequence[Sequence[float | None]]

_MOST_WITH_NUMBERS = 12
_MOST_COLUMNS = 48
_SHADES = "·░▒▒▓▓█"
"""From as fast as the median to very slow, as `Pairs.heat` counts."""


def heat_map(matrix: Matrix, names: Sequence[str]) -> str:
    """Lines of text: a row sends to a column. Up to twelve hosts with numbers, the slow ones shaded; more with shades alone.

    Args:
        matrix: (n, n) bytes a second; None or NaN where nothing was measured. The diagonal does not count.
        names: (n,) of the hosts. Of very many, those with the slowest pairs are shown.
    """
    rates = np.array([[np.nan if rate is None else rate for rate in row] for row in matrix], dtype=np.float64)
    if not rates.size or np.isnan(rates).all():
        return "nothing was measured between hosts"
    pairs = slowest_part(Pairs(names=tuple(names), rates=rates), _MOST_COLUMNS)
    short = short_names(pairs.names)
    labels = [short[name] for name in pairs.names]
    unit = units.bit_rates([pairs.median])
    lines = _numbers(pairs, labels, unit) if len(labels) <= _MOST_WITH_NUMBERS else _shades(pairs, labels)
    note = f"{unit.name}, row sends to column, median {unit.show(pairs.median)}"
    legend = (
        f"{_SHADES[0]} from {units.percent(HEAT_STEPS[0])} of it, {_SHADES[-1]} below {units.percent(HEAT_STEPS[-1])}"
    )
    shown = f"; {len(labels)} of {len(names):,} hosts, those with the slowest pairs" if len(labels) < len(names) else ""
    return "\n".join([*lines, f"{note}; {legend}{shown}"])


def _numbers(pairs: Pairs, labels: Sequence[str], unit: units.Unit) -> list[str]:
    heat = pairs.heat()
    cells = [
        [
            "" if heat[row, column] < 0 else f"{_mark(heat[row, column])}{unit.show(float(rate))}"
            for column, rate in enumerate(rates)
        ]
        for row, rates in enumerate(pairs.rates)
    ]
    side = max(map(len, labels))
    width = max(max(len(cell) for row in cells for cell in row), side)
    head = " " * side + "".join(f"  {label:>{width}}" for label in labels)
    return [
        head,
        *(f"{label:>{side}}" + "".join(f"  {cell:>{width}}" for cell in row) for label, row in zip(labels, cells)),
    ]


def _mark(step: int) -> str:
    return _SHADES[step] if step else ""


def _shades(pairs: Pairs, labels: Sequence[str]) -> list[str]:
    side = max(map(len, labels))
    return [
        f"{label:>{side}}  " + "".join(" " if step < 0 else _SHADES[step] for step in row)
        for label, row in zip(labels, pairs.heat())
    ]
