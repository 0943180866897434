"""The sweep: every kind of collective over sizes, groups and modes of overlap, and what times and bandwidths came of it.

Pure numpy: the collectives are run by whatever `Collectives` is given.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from cluster.errors import FabricError
from cluster.fabric.bandwidth import Algorithm, AlphaBeta, bandwidth, fit_alpha_beta, size_in_use
from cluster.fabric.groups import GroupSet
from cluster.fabric.measured.transport import COLLECTIVE_KINDS, DTYPE_BYTES, CollectiveKind
from cluster.fabric.probing import Endpoint

if TYPE_CHECKING:
    from cluster.fabric.measured.fabric import CollectiveTimes

Mode = Literal["isolated", "together", "with_compute"]
"""isolated: one group of the set at a time. together: all its groups at once. with_compute: the same, while every rank
computes as well."""
MODES: tuple[Mode, ...] = get_args(Mode)

_LEAST_ITERATIONS = 5
_SURELY_SHORT_BYTES = 1 << 20
"""A first size above this gets few iterations, since nothing tells yet how long it takes."""


class Collectives(Protocol):
    """What can run collectives on ranks: `cluster.fabric.measured.fabric.MeasuredFabric`, which says more."""

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The ranks that stand for hosts and rails."""
        ...

    @property
    def transport(self) -> str:
        """gloo, nccl or mpi."""
        ...

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        ...

    def collective(
        self,
        kind: CollectiveKind,
        num_bytes: int,
        groups: Sequence[Sequence[int]],
        *,
        iterations: int,
        warmup: int,
        dtype: str = "float32",
        with_compute: bool = False,
        check: bool = True,
    ) -> CollectiveTimes:
        """Runs a collective in each of `groups` at the same time. Raises UnresponsiveError or StalledError."""
        ...


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What to measure."""

    groups: tuple[GroupSet, ...]
    sizes: tuple[int, ...]
    """Bytes, as nccl-tests count them."""
    kinds: tuple[CollectiveKind, ...] = COLLECTIVE_KINDS
    modes: tuple[Mode, ...] = ("isolated", "together")
    iterations: int = 20
    """Of each row, over all passes."""
    passes: int = 2
    """The whole sweep is run so many times, with a share of the iterations: what slows the cluster down for a moment then
    does not fall on one row alone."""
    warmup: int = 3
    """Iterations that are not timed, of each row in each pass; one where time is short."""
    dtype: str = "float32"
    check: bool = True
    """Data are compared with what they must be."""
    seconds_per_row: float = 2.0
    """Large sizes get fewer iterations, so that one size of one kind takes about so long."""
    algorithm: Algorithm = "ring"
    """Whose messages the fitted alpha is of."""
    isolated_at_most: int = 8
    """Of a set with more groups, as many are measured in isolation, evenly spread."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one collective, over ranks and iterations."""

    min_s: float
    median_s: float
    p99_s: float
    noise_share: float
    """Standard error of the median, as a share of it: from the spread of iterations."""


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One kind, size, set of groups and mode."""

    kind: CollectiveKind
    num_bytes: int
    """As measured: what the plan asks for, rounded as nccl-tests do."""
    group: str
    """Name of the set."""
    mode: Mode
    group_size: int
    num_groups: int
    """Measured ones."""
    times: Times
    algbw_bytes_per_s: float
    """Of the median time, as the bus bandwidth."""
    busbw_bytes_per_s: float
    correct: bool
    slowest_ranks: tuple[int, ...] = ()
    """Of a set with several groups, the one with the greatest median time; and that time."""
    slowest_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class GroupFit:
    """The time model of one kind on one set of groups in one mode."""

    group: str
    mode: Mode
    model: AlphaBeta


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """All that a sweep measured."""

    rows: tuple[SweepRow, ...]
    fits: tuple[GroupFit, ...]
    groups: tuple[GroupSet, ...]
    transport: str
    """gloo, nccl, mpi: times of another transport are not comparable."""
    world_size: int
    hosts: tuple[str, ...]
    """Each once."""
    taken_at: str
    """ISO 8601, UTC."""
    seconds: float
    circumstances: Mapping[str, Any] = field(default_factory=dict)
    """Plain data of whoever asked for it: versions, devices, the command."""

    @property
    def correct(self) -> bool:
        """All data were right. Else the exit code is 3."""
        return all(row.correct for row in self.rows)

    def as_data(self) -> dict[str, Any]:
        """For JSON: the fields, with their names."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> SweepResult:
        """What `as_data` wrote, with or without more keys beside it. Raises KeyError or TypeError where it is another thing."""
        rows = tuple(
            SweepRow(**{**row, "times": Times(**row["times"]), "slowest_ranks": tuple(row["slowest_ranks"])})
            for row in data["rows"]
        )
        groups = tuple(GroupSet(**{**each, "groups": tuple(map(tuple, each["groups"]))}) for each in data["groups"])
        return cls(
            rows=rows,
            fits=tuple(GroupFit(**{**fit, "model": AlphaBeta.from_data(fit["model"])}) for fit in data["fits"]),
            groups=groups,
            transport=data["transport"],
            world_size=data["world_size"],
            hosts=tuple(data["hosts"]),
            taken_at=data["taken_at"],
            seconds=data["seconds"],
            circumstances=data.get("circumstances", {}),
        )


def sweep(
    fabric: Collectives, plan: SweepPlan, *, taken_at: datetime, tell: Callable[[SweepRow], None] | None = None
) -> SweepResult:
    """Measures all that the plan asks for; `tell` hears of each row in the last pass, as it comes.

    A set of one group has no `together` beside its `isolated`; groups of one rank have nothing to measure.

    Raises UnresponsiveError or StalledError.
    """
    start = time.perf_counter()
    series = [
        [_Point(plan, groups, mode, kind, size) for size in _sizes(plan, kind, groups.group_size)]
        for groups in plan.groups
        for mode in _modes(plan, groups)
        for kind in plan.kinds
    ]
    rows: list[SweepRow] = []
    for left in reversed(range(plan.passes)):
        for points in series:
            for before, point in zip((None, *points), points):
                point.measure(fabric, point.iterations(before))
                if left == 0:
                    rows.append(point.row())
                    if tell is not None:
                        tell(rows[-1])
    return SweepResult(
        rows=tuple(rows),
        fits=fits_of(rows, plan.algorithm),
        groups=plan.groups,
        transport=fabric.transport,
        world_size=fabric.world_size,
        hosts=tuple(dict.fromkeys(endpoint.host for endpoint in fabric.endpoints)),
        taken_at=taken_at.astimezone(UTC).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - start,
    )


def read_sweep(path: Path) -> SweepResult:
    """What was written as JSON of `SweepResult.as_data`. Raises FabricError where there is no such file, or another thing."""
    try:
        return SweepResult.from_data(json.loads(path.read_text()))
    except OSError as error:
        raise FabricError(
            f"{path} cannot be read ({error.strerror}): `mega fabric sweep --output` writes one"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FabricError(f"{path} is not what `mega fabric sweep --output` writes: write it anew") from error


def fits_of(rows: Sequence[SweepRow], algorithm: Algorithm = "ring") -> tuple[GroupFit, ...]:
    """A time model for each set, mode and kind that was measured with two sizes or more, on the median times."""
    series: dict[tuple[str, Mode, CollectiveKind], list[SweepRow]] = {}
    for row in rows:
        series.setdefault((row.group, row.mode, row.kind), []).append(row)
    fits = []
    for (group, mode, kind), same in series.items():
        sizes, seconds = [row.num_bytes for row in same], [row.times.median_s for row in same]
        model = fit_alpha_beta(kind, same[0].group_size, sizes, seconds, algorithm=algorithm)
        if model is not None:
            fits.append(GroupFit(group=group, mode=mode, model=model))
    return tuple(fits)


def _modes(plan: SweepPlan, groups: GroupSet) -> list[Mode]:
    if groups.group_size < 2:
        return []
    left_out = "isolated" if groups.only_together else "together" if len(groups.groups) == 1 else None
    return [mode for mode in plan.modes if mode != left_out]


def _sizes(plan: SweepPlan, kind: str, group_size: int) -> list[int]:
    """Each once, though two that were asked for may round to the same."""
    element = DTYPE_BYTES[plan.dtype]
    return sorted({size_in_use(kind, size, group_size, element) for size in plan.sizes})


class _Point:
    """One row in the making: what all passes have measured of it."""

    def __init__(self, plan: SweepPlan, groups: GroupSet, mode: Mode, kind: CollectiveKind, size: int) -> None:
        self.size = size
        self._plan = plan
        self._groups = groups
        self._mode = mode
        self._kind = kind
        self._correct = True
        self._seconds: list[NDArray[np.float64]] = []
        """Of each pass: (G, R, I), over groups, ranks of a group, iterations."""
        measured = groups.groups
        if mode == "isolated":
            places = np.linspace(0, len(measured) - 1, min(len(measured), plan.isolated_at_most))
            measured = tuple(measured[place] for place in sorted({round(place) for place in places}))
        self._measured = measured

    @property
    def median_s(self) -> float:
        """Over all passes so far."""
        return float(np.median(np.concatenate(self._seconds, axis=2)))

    def iterations(self, before: _Point | None) -> int:
        """Of the next pass: its share of those of the plan, or of those that fit into the plan's time, by what this point or
        the one of the next smaller size took; never fewer than the least."""
        plan = self._plan
        most = -(-plan.iterations // plan.passes)
        least = min(most, -(-_LEAST_ITERATIONS // plan.passes))
        if self._seconds:
            expected_s = self.median_s
        elif before is not None:
            expected_s = before.median_s * self.size / before.size
        else:
            return most if self.size <= _SURELY_SHORT_BYTES else least
        return max(least, min(most, int(plan.seconds_per_row / plan.passes / expected_s)))

    def measure(self, fabric: Collectives, iterations: int) -> None:
        """One pass."""
        plan = self._plan
        rounds = [[group] for group in self._measured] if self._mode == "isolated" else [list(self._measured)]
        cut_short = iterations * plan.passes < plan.iterations
        seconds_GRI = []
        for together in rounds:
            times = fabric.collective(
                self._kind,
                self.size,
                together,
                iterations=iterations,
                warmup=min(plan.warmup, 1) if cut_short else plan.warmup,
                dtype=plan.dtype,
                with_compute=self._mode == "with_compute",
                check=plan.check,
            )
            self._correct &= times.correct
            seconds_GRI.append(times.seconds.reshape(len(together), self._groups.group_size, -1))
        self._seconds.append(np.concatenate(seconds_GRI))

    def row(self) -> SweepRow:
        """Of all passes."""
        seconds_GRI = np.concatenate(self._seconds, axis=2)
        medians_G = np.median(seconds_GRI, axis=(1, 2))
        slowest = int(np.argmax(medians_G))
        several = len(self._measured) > 1
        times = _times(seconds_GRI)
        rate = bandwidth(self._kind, self.size, self._groups.group_size, times.median_s)
        return SweepRow(
            kind=self._kind,
            num_bytes=self.size,
            group=self._groups.name,
            mode=self._mode,
            group_size=self._groups.group_size,
            num_groups=len(self._measured),
            times=times,
            algbw_bytes_per_s=rate.algbw_bytes_per_s,
            busbw_bytes_per_s=rate.busbw_bytes_per_s,
            correct=self._correct,
            slowest_ranks=self._measured[slowest] if several else (),
            slowest_s=float(medians_G[slowest]) if several else None,
        )


def _times(seconds_GRI: NDArray[np.float64]) -> Times:
    """Over groups, ranks and iterations."""
    return Times(
        min_s=float(seconds_GRI.min()),
        median_s=float(np.median(seconds_GRI)),
        p99_s=float(np.quantile(seconds_GRI, 0.99)),
        # Ranks of one collective wait for one another: only iterations are independent of each other.
        noise_share=_error_of_median(np.log(np.median(seconds_GRI, axis=(0, 1)))),
    )


def _error_of_median(values: NDArray[np.float64]) -> float:
    """Standard error of the median of some values, of whatever distribution: half the distance between the values that are
    half a square root of their number away from the middle one on either side (the binomial's standard deviation)."""
    places = values.size / 2 + np.array([-0.5, 0.5]) * math.sqrt(values.size)
    low, high = np.clip([math.floor(places[0]), math.ceil(places[1]) - 1], 0, values.size - 1)
    ordered = np.sort(values)
    return float(ordered[high] - ordered[low]) / 2
