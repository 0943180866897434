"""Measurements over torch.distributed: gloo or NCCL. Groups are made here and belong to nobody else's world."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from cluster.fabric.measured.compute import Workpiece
from cluster.fabric.measured.stamps import Stamps, Work
from cluster.fabric.measured.torch_collectives import Exchange
from cluster.fabric.measured.trains import rate_of
from cluster.fabric.measured.transport import (
    CollectiveCall,
    CollectiveOutcome,
    Flow,
    Train,
    TransferOutcome,
    TransportStalledError,
)

_FLOWS = "flows"
_NEVER_SENT = 1 << 30
"""A tag of no message."""
_MOST_IN_MESH = 64
"""Ranks of a gloo group that all connect to all others at its start. In larger ones they do where they first need to; there
gloo may abort a process (EnforceNotMet, from a thread of its own) whose peer never connects: rank 0 then calls it missing."""
_CONNECT_FACTOR = 5
"""gloo waits for a peer to connect so many times as long as for anything else in a group."""


@dataclass(frozen=True, kw_only=True)
class TorchPlace:
    """What a group needs to know of this rank. `peers`: world ranks between which flows may run."""

    backend: Literal["gloo", "nccl"]
    rank: int
    peers: tuple[int, ...]
    device: torch.device
    store: dist.Store
    address: str
    """Of this host, on the network to be measured."""
    interface: str | None
    timeout_s: float


class TorchTransport:
    """One rank's end over gloo or NCCL. Making it is a collective of all `peers`."""

    def __init__(self, place: TorchPlace, workpiece: Workpiece) -> None:
        self.name: str = place.backend
        self._place = place
        self._workpiece = workpiece
        self._groups: dict[tuple[str, tuple[int, ...]], Any] = {}
        self._pipes: dict[bool, Any] = {}
        self._heard: int | None = None
        """A peer of whom something has come, so that there is a connection to it."""
        if place.rank in place.peers:
            # NCCL runs what one pair exchanges in one order. With a group for each direction the two do not meet.
            upwards = self._group(_FLOWS, place.peers)
            downwards = upwards if place.backend == "gloo" else self._group("flows back", place.peers)
            self._pipes = {True: upwards, False: downwards}

    def transfer(self, flows: Sequence[Flow], train: Train, *, timeout_s: float) -> TransferOutcome:
        """See `Transport.transfer`."""
        deadline = time.monotonic() + timeout_s
        rates: dict[int, float] = {}

        def take(flow: Flow) -> None:
            rates[flow.index] = self._receive(flow, train, deadline)

        # Receives in threads of their own, and first: sending may keep a thread busy, and stamps would come late.
        taking = _InThreads(take, [flow for flow in flows if flow.receiver == self._place.rank])
        giving = self._send([flow for flow in flows if flow.sender == self._place.rank], train, deadline)
        return TransferOutcome(rates=rates, unfinished=tuple(sorted({*giving, *taking.join()})))

    def round_trip(self, flows: Sequence[Flow], *, num_bytes: int, repeats: int, timeout_s: float) -> dict[int, float]:
        """See `Transport.round_trip`."""
        deadline = time.monotonic() + timeout_s
        medians: dict[int, float] = {}

        def bounce(flow: Flow) -> None:
            seconds = self._bounce(flow, num_bytes, repeats, deadline)
            if flow.sender == self._place.rank:
                medians[flow.index] = statistics.median(seconds[1:])  # the first one opens connections

        if unfinished := _InThreads(bounce, flows).join():
            raise TransportStalledError(f"{len(unfinished)} of {len(flows)} round trips of rank {self._place.rank}")
        return medians

    def collective(self, call: CollectiveCall, *, timeout_s: float) -> CollectiveOutcome:
        """See `Transport.collective`."""
        deadline = time.monotonic() + timeout_s
        try:
            exchange = Exchange(call, self._group("collectives", call.group), self._place.rank, self._place.device)
        except RuntimeError as error:
            raise TransportStalledError(str(error).strip().splitlines()[0]) from error
        background = self._workpiece.in_background() if call.with_compute else contextlib.nullcontext()
        with background:
            seconds = exchange.run(deadline)
        return CollectiveOutcome(seconds=seconds, correct=exchange.is_correct(deadline) if call.check else True)

    def abort(self) -> None:
        """Makes everything fail that waits in another thread. Ends this transport."""
        for (_, ranks), group in list(self._groups.items()):
            with contextlib.suppress(RuntimeError):
                if self.name == "nccl":
                    group.abort()
                elif len(ranks) > 1:
                    # gloo has no abort: but where one wait's time is up, it fails all others of the group.
                    other = ranks.index(self._place.rank) + 1
                    if self._heard in ranks and len(ranks) > _MOST_IN_MESH:
                        other = ranks.index(self._heard)
                    group.recv([torch.empty(1)], other % len(ranks), _NEVER_SENT).wait(timedelta(milliseconds=1))

    def close(self, *, clean: bool) -> None:
        """See `Transport.close`."""
        if not clean:
            self.abort()
            for group in self._groups.values():
                # A gloo group's end waits for what hangs in it, and what wakes while the interpreter ends kills the
                # process: such a group is never ended.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        elif self.name == "nccl":
            for group in self._groups.values():
                group.shutdown()
        self._groups.clear()
        self._pipes.clear()

    def _group(self, purpose: str, ranks: tuple[int, ...]) -> Any:
        """The group of `ranks` (world ranks, in its order). Made on first use, which is a collective of them."""
        key = (purpose, ranks)
        if key not in self._groups:
            place = self._place
            store = dist.PrefixStore(f"{purpose} {' '.join(map(str, ranks))}", place.store)
            make = _gloo_group if place.backend == "gloo" else _nccl_group
            timeout_s = place.timeout_s
            if purpose == _FLOWS and len(ranks) > _MOST_IN_MESH:
                # Whoever asks for a peer that does not connect can do nothing else, and must be back within the round.
                timeout_s /= 2 * _CONNECT_FACTOR
            self._groups[key] = make(place, store, ranks.index(place.rank), len(ranks), timedelta(seconds=timeout_s))
        return self._groups[key]

    def _pipe(self, sender: int, receiver: int) -> Any:
        return self._pipes[sender < receiver]

    def _receive(self, flow: Flow, train: Train, deadline: float) -> float:
        """Bytes a second. Raises TransportStalledError, or RuntimeError where the sender is gone."""
        pipe, sender = self._pipe(flow.sender, flow.receiver), self._place.peers.index(flow.sender)
        # One buffer for all chunks: nobody looks at what is in them.
        chunk = torch.empty(train.chunk_bytes, dtype=torch.uint8, device=self._place.device)
        stamps = Stamps(self._place.device)
        stamps.stamp()
        works = [pipe.recv([chunk], sender, flow.index) for _ in range(train.num_warmup + train.num_chunks)]
        for number, work in enumerate(works, start=1):
            stamps.wait(work, deadline)
            self._heard = flow.sender
            if number >= train.num_warmup:
                stamps.stamp()
        return rate_of(stamps.seconds(deadline), train)

    def _send(self, flows: Sequence[Flow], train: Train, deadline: float) -> list[int]:
        """Sends all trains at once, a chunk of each at a time. Returns the indices of those that did not come through."""
        stamps = Stamps(self._place.device)
        chunk = torch.zeros(train.chunk_bytes, dtype=torch.uint8, device=self._place.device)
        works: dict[int, list[Work]] = {flow.index: [] for flow in flows}
        failed: set[int] = set()
        for _ in range(train.num_warmup + train.num_chunks):
            for flow in flows:
                if flow.index in failed:
                    continue
                pipe, receiver = self._pipe(flow.sender, flow.receiver), self._place.peers.index(flow.receiver)
                try:
                    works[flow.index].append(pipe.send([chunk], receiver, flow.index))
                except RuntimeError:  # the receiver is gone
                    failed.add(flow.index)
        for index, under_way in works.items():
            try:
                for work in under_way:
                    stamps.wait(work, deadline)
                stamps.stamp()
                stamps.seconds(deadline)
            except TransportStalledError:
                failed.add(index)
        return sorted(failed)

    def _bounce(self, flow: Flow, num_bytes: int, repeats: int, deadline: float) -> list[float]:
        """Seconds of each trip, as the flow's sender sees it; one more than `repeats`."""
        begins = flow.sender == self._place.rank
        there, back = self._pipe(flow.sender, flow.receiver), self._pipe(flow.receiver, flow.sender)
        outward, inward = (there, back) if begins else (back, there)
        peer = self._place.peers.index(flow.receiver if begins else flow.sender)
        device = self._place.device
        given = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        taken = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        # All receives at once: no message has to ask first whether it may come.
        arrivals = [inward.recv([taken], peer, flow.index) for _ in range(repeats + 1)]
        seconds = []
        for arrival in arrivals:
            trip = Stamps(device)
            trip.stamp()
            if begins:
                trip.wait(outward.send([given], peer, flow.index), deadline)
            trip.wait(arrival, deadline)
            trip.stamp()
            seconds.append(trip.seconds(deadline)[-1])
            if not begins:
                trip.wait(outward.send([given], peer, flow.index), deadline)
        return seconds


class _InThreads:
    """Runs `work` for each flow at the same time, each in a thread, starting now."""

    def __init__(self, work: Callable[[Flow], None], flows: Sequence[Flow]) -> None:
        self._work = work
        self._unfinished: list[int] = []
        self._threads = [
            threading.Thread(target=self._run, args=(flow,), name="fabric-flow", daemon=True) for flow in flows
        ]
        for thread in self._threads:
            thread.start()

    def join(self) -> list[int]:
        """Waits for all, and returns the indices of those that stalled or lost their peer."""
        for thread in self._threads:
            thread.join()
        return self._unfinished

    def _run(self, flow: Flow) -> None:
        try:
            self._work(flow)
        except (TransportStalledError, RuntimeError):
            self._unfinished.append(flow.index)


def _gloo_group(place: TorchPlace, store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    gloo: Any = dist.ProcessGroupGloo  # its types lack what is used here
    options = gloo._Options()
    # Not by the host's name, as gloo does by itself: names resolve to the loopback device on many machines.
    where = {"interface": place.interface} if place.interface else {"hostname": place.address}
    options._devices = [gloo.create_device(**where, lazy_init=size > _MOST_IN_MESH)]
    options._timeout = timeout
    return gloo(store, rank, size, options)


def _nccl_group(place: TorchPlace, store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)
