"""Measurements over MPI: a transport that shares nothing with NCCL or gloo.

All calls are non-blocking ones that are asked now and then whether they are through: a blocking call waits for a lost peer
for ever, and with all its core's time.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import FabricError
from cluster.fabric.measured.compute import Workpiece
from cluster.fabric.measured.mpi_world import load_mpi
from cluster.fabric.measured.patterns import element_counts, expected_values, given_values
from cluster.fabric.measured.trains import rate_of
from cluster.fabric.measured.transport import (
    DTYPE_BYTES,
    CollectiveCall,
    CollectiveOutcome,
    Flow,
    Train,
    TransferOutcome,
    TransportStalledError,
)

_TAGS = 16384
"""Tags of flows: MPI promises 32,767 at least. Two flows between the same ranks stay apart as long as they are fewer."""
_EAGER_S = 1e-3
"""So long a wait asks without pause, since most messages are there by then; afterwards it leaves the core to others."""
_PAUSE_S = 50e-6


class MpiTransport:
    """One rank's end over MPI. MPI must have been started with the same ranks as the fabric's world."""

    name = "mpi"

    def __init__(self, rank: int, world_size: int, workpiece: Workpiece) -> None:
        """Raises FabricError where MPI is not there, or was not started with the same ranks."""
        self._mpi = load_mpi()
        world = self._mpi.COMM_WORLD
        if (world.Get_rank(), world.Get_size()) != (rank, world_size):
            raise FabricError(
                f"MPI calls rank {rank} of {world_size} its rank {world.Get_rank()} of {world.Get_size()}: start all ranks "
                "with one mpirun, or one srun --mpi, and measure over mpi on all of them"
            )
        self._rank = rank
        self._workpiece = workpiece
        self._world = world
        self._groups: dict[tuple[int, ...], Any] = {}

    def transfer(self, flows: Sequence[Flow], train: Train, *, timeout_s: float) -> TransferOutcome:
        """See `Transport.transfer`."""
        deadline = time.monotonic() + timeout_s
        count = train.num_warmup + train.num_chunks
        chunk = np.zeros(train.chunk_bytes, dtype=np.uint8)
        stamps: dict[int, list[float]] = {}
        requests: list[Any] = []
        owners: list[Flow] = []
        for flow in sorted(flows, key=lambda flow: flow.receiver != self._rank):
            tag = flow.index % _TAGS
            if flow.receiver == self._rank:
                stamps[flow.index] = [time.perf_counter()]
                taken = np.empty(train.chunk_bytes, dtype=np.uint8)
                requests += [self._world.Irecv(taken, source=flow.sender, tag=tag) for _ in range(count)]
            else:
                requests += [self._world.Isend(chunk, dest=flow.receiver, tag=tag) for _ in range(count)]
            owners += [flow] * count

        def note(finished: Sequence[int]) -> None:
            now = time.perf_counter()
            for place in finished:
                if owners[place].index in stamps:
                    stamps[owners[place].index].append(now)

        pending = self._complete(requests, deadline, note)
        unfinished = {owners[place].index for place in pending}
        rates = {
            index: rate_of([moments[0], *moments[train.num_warmup :]], train)
            for index, moments in stamps.items()
            if index not in unfinished
        }
        return TransferOutcome(rates=rates, unfinished=tuple(sorted(unfinished)))

    def round_trip(self, flows: Sequence[Flow], *, num_bytes: int, repeats: int, timeout_s: float) -> dict[int, float]:
        """See `Transport.round_trip`. One flow after another begins its next trip when its last is back."""
        deadline = time.monotonic() + timeout_s
        trips = {flow.index: _Trips(self._world, flow, self._rank, num_bytes, repeats + 1) for flow in flows}
        pending = dict(trips)
        while pending:
            for index in [index for index, trip in pending.items() if trip.advance()]:
                del pending[index]
            if pending and not self._linger(deadline, min(trip.began for trip in pending.values())):
                raise TransportStalledError(f"{len(pending)} of {len(flows)} round trips of rank {self._rank}")
        return {index: statistics.median(trip.seconds[1:]) for index, trip in trips.items() if trip.begins}

    def collective(self, call: CollectiveCall, *, timeout_s: float) -> CollectiveOutcome:
        """See `Transport.collective`."""
        deadline = time.monotonic() + timeout_s
        if call.dtype in ("bfloat16", "float16"):
            raise FabricError(f"MPI knows no {call.dtype}: measure in float32")
        if call.group not in self._groups:
            everybody = self._world.Get_group()
            self._groups[call.group] = self._world.Create_group(everybody.Incl(list(call.group)))
        group, size, index = self._groups[call.group], len(call.group), call.group.index(self._rank)
        given_count, taken_count = element_counts(call.kind, call.num_bytes // DTYPE_BYTES[call.dtype], size)
        given = np.zeros(given_count, dtype=call.dtype)
        taken = given if call.kind == "broadcast" else np.zeros(taken_count, dtype=call.dtype)
        begin = _OPERATIONS[call.kind]

        def once() -> None:
            if self._complete(begin(group, given, taken), deadline, lambda _: None):
                raise TransportStalledError(f"{call.kind} of rank {self._rank}")

        with self._workpiece.in_background() if call.with_compute else contextlib.nullcontext():
            if self._complete([group.Ibarrier()], deadline, lambda _: None):
                raise TransportStalledError(f"the barrier before {call.kind}")
            ends = []
            for number in range(call.warmup + call.iterations + 1):
                if number:
                    once()
                ends.append(time.perf_counter())
        correct = True
        if call.check:
            given[:] = given_values(call.kind, index, size, given_count)
            once()
            correct = bool(np.array_equal(taken, expected_values(call.kind, index, size, taken_count)))
        return CollectiveOutcome(seconds=tuple(np.diff(ends[call.warmup :]).tolist()), correct=correct)

    def abort(self) -> None:
        """Nothing: no call of this transport waits without looking at the time."""

    def close(self, *, clean: bool) -> None:
        """Nothing: `leave` ends MPI, once nothing else is left to do."""

    def _complete(self, requests: Sequence[Any], deadline: float, note: Callable[[Sequence[int]], None]) -> list[int]:
        """Waits for all, telling `note` which have come each time some have. Returns those that had not by the deadline."""
        pending = list(range(len(requests)))
        last = time.monotonic()
        while pending:
            finished = [place for place in pending if requests[place].Test()]
            if finished:
                note(finished)
                gone = set(finished)
                pending = [place for place in pending if place not in gone]
                last = time.monotonic()
            elif not self._linger(deadline, last):
                return pending
        return []

    def _linger(self, deadline: float, since: float) -> bool:
        """Between two questions: lets others have the core. False when time is up."""
        now = time.monotonic()
        if now - since < _EAGER_S:
            os.sched_yield()
        else:
            time.sleep(_PAUSE_S)
        return now < deadline


class _Trips:
    """The round trips of one flow, at one of its ends."""

    def __init__(self, world: Any, flow: Flow, rank: int, num_bytes: int, count: int) -> None:
        self.begins = flow.sender == rank
        self.seconds: list[float] = []
        self.began = time.monotonic()
        self._world = world
        self._peer = flow.receiver if self.begins else flow.sender
        self._tag = flow.index % _TAGS
        self._given = np.zeros(num_bytes, dtype=np.uint8)
        self._taken = np.empty(num_bytes, dtype=np.uint8)
        self._left = count
        self._sending: Any = None
        self._start()

    def advance(self) -> bool:
        """Goes on as far as it can without waiting; True when all trips are over."""
        while self._left and self._arrival.Test() and (self._sending is None or self._sending.Test()):
            if self.begins:
                self.seconds.append(time.perf_counter() - self._sent)
            else:
                self._sending = self._world.Isend(self._given, dest=self._peer, tag=self._tag)
            self._left -= 1
            self.began = time.monotonic()
            if self._left:
                self._start()
        return not self._left and (self._sending is None or bool(self._sending.Test()))

    def _start(self) -> None:
        self._arrival = self._world.Irecv(self._taken, source=self._peer, tag=self._tag)
        if self.begins:
            self._sent = time.perf_counter()
            self._sending = self._world.Isend(self._given, dest=self._peer, tag=self._tag)


Values = NDArray[Any]


def _send_recv(group: Any, given: Values, taken: Values) -> Sequence[Any]:
    rank, size = group.Get_rank(), group.Get_size()
    return [group.Irecv(taken, source=(rank - 1) % size), group.Isend(given, dest=(rank + 1) % size)]


_OPERATIONS: Mapping[str, Callable[[Any, Values, Values], Sequence[Any]]] = {
    "all_reduce": lambda group, given, taken: [group.Iallreduce(given, taken)],
    "all_gather": lambda group, given, taken: [group.Iallgather(given, taken)],
    "reduce_scatter": lambda group, given, taken: [group.Ireduce_scatter_block(given, taken)],
    "all_to_all": lambda group, given, taken: [group.Ialltoall(given, taken)],
    "broadcast": lambda group, given, taken: [group.Ibcast(given, root=0)],
    "send_recv": _send_recv,
}
