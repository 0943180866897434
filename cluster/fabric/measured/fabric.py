"""A fabric of real ranks: rank 0 asks, all ranks measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cluster.fabric.measured.place import FabricPlace, MeasureOptions
from cluster.fabric.measured.transport import CollectiveKind
from cluster.fabric.probing import Endpoint, Figures, Flows

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CollectiveTimes:
    """What all ranks of all groups saw of a collective."""

    ranks: tuple[int, ...]
    """World ranks of the rows, group after group."""
    seconds: Figures
    """(ranks, iterations): of each iteration, from the end of the one before."""
    correct: bool
    """Whether every rank's checked result was right."""


class MeasuredFabric:
    """`cluster.fabric.probing.Fabric` on real ranks, and the collectives of the sweep. Lives on rank 0.

    Every measurement raises `UnresponsiveError` or `StalledError`; after the first of them the fabric measures no more,
    and raises that error again.
    """

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """One rank of each host; with `rails`, and where all ranks are on one host, every rank."""
        raise NotImplementedError

    @property
    def seconds(self) -> float:
        """Since the ranks met."""
        raise NotImplementedError

    @property
    def transport(self) -> str:
        """gloo, nccl or mpi."""
        raise NotImplementedError

    @property
    def world_size(self) -> int:
        """Ranks in all, endpoints or not."""
        raise NotImplementedError

    def compute(self, who: Sequence[int], *, work_s: float) -> Figures:
        """See `Fabric.compute`. Ranks of one machine take turns."""
        raise NotImplementedError

    def transfer(self, flows: Flows, *, num_bytes: int) -> Figures:
        """See `Fabric.transfer`."""
        raise NotImplementedError

    def round_trip(self, pairs: Flows, *, repeats: int, num_bytes: int = 8) -> Figures:
        """See `Fabric.round_trip`; the message has `num_bytes`."""
        raise NotImplementedError

    def counters(self) -> Sequence[Mapping[str, float]]:
        """See `Fabric.counters`."""
        raise NotImplementedError

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
        """Runs a collective in each of `groups` (disjoint lists of world ranks) at the same time.

        `num_bytes` is the size as nccl-tests defines it for each kind: of all that a rank ends up with for all_gather, of
        all that it gives for reduce_scatter and all_to_all, of the buffer for the others. send_recv: each rank sends to
        the next of its group and receives from the one before. `with_compute`: ranks compute at the same time.
        `check`: data are compared with what they must be, once, outside the timing.
        """
        raise NotImplementedError


def run_on_fabric(place: FabricPlace, options: MeasureOptions, work: Callable[[MeasuredFabric], T]) -> T | None:
    """Runs `work` on rank 0, with all other ranks serving its measurements, and returns its result there, None elsewhere.

    Called once by every rank. `work` may diagnose as often as it likes: ranks serve until it returns. Where ranks have
    not come in `start_timeout_s`, `work` runs all the same, and its first measurement raises `UnresponsiveError` naming them.
    Raises FabricError on a rank that cannot reach rank 0 or loses it, that came too late, or that differs from rank 0
    in versions or options.
    """
    raise NotImplementedError
