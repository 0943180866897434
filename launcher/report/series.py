"""The figures of metrics.jsonl as curves, however many lines there are."""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

POINTS = 500
"""Of a curve, at most: more than that a page cannot show."""
_KEPT_BALANCES = 512
_STEP_KEYS = (
    "step", "loss", "tokens_per_s", "mfu", "step_time_s", "data_s", "compute_s", "update_s", "save_s", "memory_bytes",
)  # fmt: skip
_VALIDATION_KEYS = ("step", "val_loss", "val_bits_per_byte")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values over steps; each point stands for as many steps as there are to one."""

    steps: Values
    mean: Values
    low: Values
    high: Values

    @property
    def is_thinned(self) -> bool:
        """Whether a point stands for several steps."""
        return bool(np.any(self.low < self.high))


@dataclass
class MetricSeries:
    """Fills while somebody else reads the lines."""

    steps: dict[str, array[float]] = field(default_factory=lambda: {key: array("d") for key in _STEP_KEYS})
    """A value a step; NaN where a line has none."""
    validations: dict[str, array[float]] = field(default_factory=lambda: {key: array("d") for key in _VALIDATION_KEYS})
    balances: list[tuple[int, tuple[float, ...]]] = field(default_factory=list)
    """Step, and for each layer how evenly its experts are used: 1 is perfect balance, 0 is one expert for all tokens."""
    _every: int = 1

    def watch(self, lines: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The lines, as they are."""
        for line in lines:
            if isinstance(line.get("step"), int):
                self._add(line)
            yield line

    def __len__(self) -> int:
        return len(self.steps["step"])

    def curve(self, key: str, *, without: Collection[int] = ()) -> Curve | None:
        """A figure over steps, `without` some of them; None where no step has it."""
        steps, values = np.array(self.steps["step"]), np.array(self.steps[key])
        if without:
            values[np.isin(steps, list(without))] = np.nan
        return thinned(steps, values)

    def validation(self, key: str) -> Curve | None:
        """A figure of the validations."""
        return thinned(np.array(self.validations["step"]), np.array(self.validations[key]))

    def last(self, key: str) -> float | None:
        """The newest value."""
        values = self.validations[key] if key in self.validations else self.steps[key]
        return next((value for value in reversed(values) if math.isfinite(value)), None)

    def usual(self, key: str, *, newest: int = 1000) -> float | None:
        """The median over the newest steps."""
        values = np.array(self.steps[key][-newest:])
        known = values[np.isfinite(values)]
        return float(np.median(known)) if known.size else None

    def most(self, key: str) -> float | None:
        """The greatest value."""
        values = np.array(self.steps[key])
        known = values[np.isfinite(values)]
        return float(known.max()) if known.size else None

    def _add(self, line: Mapping[str, Any]) -> None:
        if "loss" in line:
            for key, values in self.steps.items():
                values.append(_number(line.get(key)))
            if "expert_counts" in line and line["step"] % self._every == 0:
                self._add_balance(line["step"], line["expert_counts"])
        elif "val_loss" in line:
            for key, values in self.validations.items():
                values.append(_number(line.get(key)))

    def _add_balance(self, step: int, counts_LE: Any) -> None:
        try:
            balance = tuple(_evenness(counts_E) for counts_E in counts_LE)
        except (TypeError, ValueError):  # a damaged line
            return
        if balance:
            self.balances.append((step, balance))
        if len(self.balances) > 2 * _KEPT_BALANCES:
            self._every *= 2
            self.balances = [each for each in self.balances if each[0] % self._every == 0]


def thinned(steps: Values, values: Values, *, points: int = POINTS) -> Curve | None:
    """A curve of at most so many points, over the values that are numbers; None where none is."""
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    if not steps.size:
        return None
    if np.any(np.diff(steps) < 0):  # a file that somebody has changed
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
    begins = np.unique(np.linspace(0, steps.size, min(points, steps.size), endpoint=False).astype(np.intp))
    sizes = np.diff(np.append(begins, steps.size))
    return Curve(
        steps=np.add.reduceat(steps, begins) / sizes,
        mean=np.add.reduceat(values, begins) / sizes,
        low=np.minimum.reduceat(values, begins),
        high=np.maximum.reduceat(values, begins),
    )


def _evenness(counts: Any) -> float:
    """Entropy of the load over its greatest value."""
    total = sum(counts)
    if len(counts) < 2 or total <= 0:
        return 1.0
    return -sum(count / total * math.log(count / total) for count in counts if count > 0) / math.log(len(counts))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
