"""The sweep: every kind of collective over sizes, groups and modes of overlap, and what times and bandwidths came of it.

Pure numpy: the collectives are run by whatever `Collectives` is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from cluster.fabric.bandwidth import Algorithm, AlphaBeta
from cluster.fabric.groups import GroupSet
from cluster.fabric.measured.transport import COLLECTIVE_KINDS, CollectiveKind
from cluster.fabric.probing import Endpoint

if TYPE_CHECKING:
    from cluster.fabric.measured.fabric import CollectiveTimes

Mode = Literal["isolated", "together", "with_compute"]
"""isolated: one group of the set at a time. together: all its groups at once. with_compute: the same, while every rank
computes as well."""
MODES: tuple[Mode, ...] = get_args(Mode)


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
    warmup: int = 3
    dtype: str = "float32"
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
    transport: str
    """gloo, nccl, mpi: times of another transport are not comparable."""
    world_size: int
    hosts: tuple[str, ...]
    """Each once."""
    taken_at: str
    """ISO 8601, UTC."""
    seconds: float
    circumstances: Mapping[str, Any] = field(default_factory=dict)
    """Plain data: versions, devices, the command."""

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        raise NotImplementedError

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> SweepResult:
        """What `as_data` wrote."""
        raise NotImplementedError


def sweep(
    fabric: Collectives, plan: SweepPlan, *, taken_at: datetime, tell: Callable[[SweepRow], None] | None = None
) -> SweepResult:
    """Measures all that the plan asks for; `tell` hears of each row as it comes.

    Raises UnresponsiveError or StalledError.
    """
    raise NotImplementedError
