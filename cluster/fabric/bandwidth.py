"""Bandwidths of collectives as nccl-tests define them, and the time model with which alpha and beta are fitted.

    time = steps * alpha + factor * size * beta

`size` is that of nccl-tests (see `Collectives.collective`), `factor` their bus bandwidth's, so that 1 / beta is the bus
bandwidth of very large messages. `steps` are the messages that follow one another in the algorithm.

Sources: NVIDIA/nccl-tests, doc/PERFORMANCE.md and src/*.cu (`GetCollByteCount`, `GetBw`); Thakur, Rabenseifner and Gropp
(2005), Optimization of collective communication operations in MPICH, for the counts of messages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cluster.fabric.statistics import LeastSquares, least_squares

Algorithm = Literal["ring", "tree"]

# Factor of the bus bandwidth for n ranks: (n - 1) / n, times this; 1 whatever n for those that are not here.
_SHARED_OUT: dict[str, int] = {
    "all_reduce": 2,
    "all_gather": 1,
    "reduce_scatter": 1,
    "all_to_all": 1,
    "gather": 1,
    "scatter": 1,
}
_FROM_ONE = frozenset({"broadcast", "reduce", "send_recv"})
_ALIGNMENT_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """Bytes a second, by both definitions."""

    algbw_bytes_per_s: float
    busbw_bytes_per_s: float


def bus_factor(kind: str, group_size: int) -> float:
    """Bus bandwidth over algorithm bandwidth: what each rank's link must carry of every byte of the size.

    kind: one of COLLECTIVES, or reduce, gather, scatter. Raises ValueError for another.
    """
    if kind in _FROM_ONE:
        return 1.0
    if kind not in _SHARED_OUT:
        raise ValueError(f"{kind!r} has no bus bandwidth: known are {', '.join(sorted({*_SHARED_OUT, *_FROM_ONE}))}")
    return _SHARED_OUT[kind] * (group_size - 1) / group_size


def bandwidth(kind: str, num_bytes: int, group_size: int, seconds: float) -> Bandwidth:
    """algbw = size / time and busbw = algbw * factor, in bytes (not GB) a second."""
    algorithm = num_bytes / seconds
    return Bandwidth(algbw_bytes_per_s=algorithm, busbw_bytes_per_s=algorithm * bus_factor(kind, group_size))


def size_in_use(kind: str, num_bytes: int, group_size: int, element_bytes: int) -> int:
    """The size that a collective asked for `num_bytes` really has, as nccl-tests round it: whole elements, and parts of a
    rank of whole 16 bytes where the size is shared out. At least one such part (nccl-tests would run nothing)."""
    elements = max(num_bytes // element_bytes, 1)
    if kind not in _SHARED_OUT or kind == "all_reduce":
        return elements * element_bytes
    aligned = max(_ALIGNMENT_BYTES // element_bytes, 1)
    part = max(elements // group_size // aligned * aligned, aligned)
    return part * group_size * element_bytes


def message_steps(kind: str, group_size: int, algorithm: Algorithm = "ring") -> int:
    """Messages that follow one another: what alpha is paid for.

    ring: 2 (n - 1) for all_reduce, n - 1 for the other collectives. tree (or recursive doubling): ceil(log2 n) instead of
    n - 1. One for send_recv, and for all_to_all n - 1 exchanges with either.
    """
    if kind == "send_recv":
        return 1
    depth = math.ceil(math.log2(group_size)) if algorithm == "tree" and kind != "all_to_all" else group_size - 1
    return 2 * depth if kind == "all_reduce" else depth


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and the ends of its 95 % confidence interval: None where there were too few points to have one."""

    value: float
    low: float | None
    high: float | None

    @property
    def reach(self) -> float | None:
        """Half of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True, kw_only=True)
class AlphaBeta:
    """A fitted time model of one kind of collective on groups of one size."""

    kind: str
    group_size: int
    algorithm: Algorithm
    alpha_s: Interval
    """Seconds a message; never below zero."""
    beta_s_per_byte: Interval
    """Seconds a byte on the link: 1 / beta is the bus bandwidth of large messages. Never below zero."""
    correlation: float
    """Of the errors of the two, -1 to 1."""
    residual_share: float
    """Standard deviation of a measured time about the model, as a share of it; 0 where two sizes leave nothing."""
    num_sizes: int

    def seconds(self, num_bytes: float, *, count: float = 1) -> Interval:
        """How long `count` collectives of `num_bytes` in all take, one after another."""
        messages = count * message_steps(self.kind, self.group_size, self.algorithm)
        on_link = num_bytes * bus_factor(self.kind, self.group_size)
        value = messages * self.alpha_s.value + on_link * self.beta_s_per_byte.value
        if self.alpha_s.reach is None or self.beta_s_per_byte.reach is None:
            return Interval(value=value, low=None, high=None)
        a, b = messages * self.alpha_s.reach, on_link * self.beta_s_per_byte.reach
        reach = math.sqrt(max(a * a + b * b + 2 * self.correlation * a * b, 0.0))
        return Interval(value=value, low=max(value - reach, 0.0), high=value + reach)

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> AlphaBeta:
        """What `as_data` wrote."""
        intervals = {name: Interval(**data[name]) for name in ("alpha_s", "beta_s_per_byte")}
        return cls(**{**data, **intervals})


def fit_alpha_beta(
    kind: str,
    group_size: int,
    sizes: Sequence[int],
    seconds: Sequence[float],
    *,
    algorithm: Algorithm = "ring",
) -> AlphaBeta | None:
    """Least squares of the relative residuals: each is weighted 1 / time, since noise is a share of a time.

    sizes, seconds: of each measurement, in bytes as nccl-tests count them. None where fewer than two different sizes or
    a group of one rank leave nothing to fit. An estimate below zero is set to zero and the other one fitted alone.
    """
    if group_size < 2 or len(set(sizes)) < 2:
        return None
    time = np.asarray(seconds, dtype=np.float64)
    steps = np.full(len(time), message_steps(kind, group_size, algorithm), dtype=np.float64)
    design = np.stack([steps, np.asarray(sizes, dtype=np.float64) * bus_factor(kind, group_size)], axis=1)
    fit = least_squares(design, time, time**-2.0)
    estimates = [_interval(fit, place) for place in range(2)]
    below = fit.coefficients < 0
    if np.any(below):
        kept = int(np.argmin(below))
        high = estimates[1 - kept].high
        none = Interval(value=0.0, low=None, high=None)
        estimates[1 - kept] = none if high is None else Interval(value=0.0, low=0.0, high=max(high, 0.0))
        fit = least_squares(design[:, [kept]], time, time**-2.0)
        estimates[kept] = _interval(fit, 0)
    return AlphaBeta(
        kind=kind,
        group_size=group_size,
        algorithm=algorithm,
        alpha_s=estimates[0],
        beta_s_per_byte=estimates[1],
        correlation=0.0 if np.any(below) else _correlation(design / time[:, None]),
        residual_share=fit.residual_spread if fit.dof else 0.0,
        num_sizes=len(set(sizes)),
    )


def _interval(fit: LeastSquares, place: int) -> Interval:
    value, low, high = (float(ends[place]) for ends in (fit.coefficients, fit.low, fit.high))
    known = math.isfinite(low) and math.isfinite(high)
    return Interval(value=value, low=low if known else None, high=high if known else None)


def _correlation(weighted: NDArray[np.float64]) -> float:
    """Of the errors of two coefficients: that of the inverse of X'X, which is minus the cosine of its columns."""
    first, second = weighted.T
    return -float(first @ second / math.sqrt((first @ first) * (second @ second)))
