"""What carries the bytes of a measurement: torch.distributed or MPI behind one interface. Imports without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv"]
COLLECTIVE_KINDS: tuple[CollectiveKind, ...] = get_args(CollectiveKind)

DTYPE_BYTES: dict[str, int] = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "int32": 4, "uint8": 1}


@dataclass(frozen=True, kw_only=True)
class Flow:
    """One flow of a round. `index` is the same at both ends, and no two flows of a round share one."""

    index: int
    sender: int
    receiver: int


@dataclass(frozen=True, kw_only=True)
class Train:
    """A flow's bytes: `num_warmup` chunks that fill pipes and buffers, then `num_chunks` that are timed."""

    chunk_bytes: int
    num_chunks: int
    num_warmup: int


@dataclass(frozen=True, kw_only=True)
class TransferOutcome:
    """What one rank saw of a round's flows."""

    rates: dict[int, float] = field(default_factory=dict)
    """Bytes a second by flow index, of the flows that this rank receives."""
    unfinished: tuple[int, ...] = ()
    """Indices of the flows of this rank, in or out, that were not through when time was up."""


@dataclass(frozen=True, kw_only=True)
class CollectiveOutcome:
    """What one rank saw of a collective."""

    seconds: tuple[float, ...]
    """Of each iteration, from the end of the one before."""
    correct: bool
    """Whether the checked result was the expected one; True where nothing was checked."""


@dataclass(frozen=True, kw_only=True)
class CollectiveCall:
    """One collective of one group. `num_bytes` as nccl-tests defines the size of each kind."""

    kind: CollectiveKind
    num_bytes: int
    group: tuple[int, ...]
    """World ranks, in the group's order. The first is a broadcast's root."""
    iterations: int
    warmup: int
    dtype: str
    with_compute: bool
    check: bool


class TransportStalledError(Exception):
    """A round trip or a collective was not through when its time was up, or the transport failed. What, and why."""


class Transport(Protocol):
    """One rank's end. Ranks are world ranks; each call is made by all ranks that it names, at about the same time."""

    name: str

    def transfer(self, flows: Sequence[Flow], train: Train, *, timeout_s: float) -> TransferOutcome:
        """Runs the flows that begin or end here, all at once. Never raises for a peer that fails: see `unfinished`."""
        ...

    def round_trip(self, flows: Sequence[Flow], *, num_bytes: int, repeats: int, timeout_s: float) -> dict[int, float]:
        """Median seconds there and back by flow index, of the flows that begin here. Raises TransportStalledError."""
        ...

    def collective(self, call: CollectiveCall, *, timeout_s: float) -> CollectiveOutcome:
        """Runs it `warmup + iterations` times. Raises TransportStalledError."""
        ...

    def abort(self) -> None:
        """Makes what waits in another thread fail, as far as it can be done. Ends this transport."""
        ...

    def close(self, *, clean: bool) -> None:
        """Lets go of everything; without `clean`, of nothing that may wait for a peer."""
        ...
