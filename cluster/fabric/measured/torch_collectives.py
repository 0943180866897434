"""The collectives of the sweep on one group of torch.distributed: buffers, the operation, its timing and its check."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from cluster.fabric.measured.patterns import element_counts, expected_values, given_values
from cluster.fabric.measured.stamps import Stamps
from cluster.fabric.measured.transport import DTYPE_BYTES, CollectiveCall, TransportStalledError


class Exchange:
    """One collective of one group, with buffers of its own, from this rank's place in it."""

    def __init__(self, call: CollectiveCall, group: Any, rank: int, device: torch.device) -> None:
        self._call = call
        self._group = group
        self._device = device
        self._index = call.group.index(rank)
        dtype = getattr(torch, call.dtype)
        given, taken = element_counts(call.kind, call.num_bytes // DTYPE_BYTES[call.dtype], len(call.group))
        self._given = torch.zeros(given, dtype=dtype, device=device)
        # all_reduce and broadcast work in place.
        in_place = call.kind in ("all_reduce", "broadcast")
        self._taken = self._given if in_place else torch.zeros(taken, dtype=dtype, device=device)
        self._begin = _OPERATIONS[call.kind]

    def run(self, deadline: float) -> tuple[float, ...]:
        """Seconds of each iteration, from the end of the one before, as nccl-tests' mean over a run counts them.

        Raises TransportStalledError.
        """
        stamps = Stamps(self._device)
        self._once(stamps, deadline, self._start_together)
        for _ in range(self._call.warmup):
            self._once(stamps, deadline, self._start)
        stamps.stamp()
        for _ in range(self._call.iterations):
            self._once(stamps, deadline, self._start)
            stamps.stamp()
        ends = stamps.seconds(deadline)
        return tuple(after - before for before, after in itertools.pairwise(ends))

    def is_correct(self, deadline: float) -> bool:
        """Runs it once more, on data that tell every element's origin. Raises TransportStalledError."""
        call, size = self._call, len(self._call.group)
        dtype = self._given.dtype
        self._given.copy_(torch.from_numpy(given_values(call.kind, self._index, size, self._given.numel())).to(dtype))
        stamps = Stamps(self._device)
        self._once(stamps, deadline, self._start)
        stamps.stamp()
        stamps.seconds(deadline)
        expected = torch.from_numpy(expected_values(call.kind, self._index, size, self._taken.numel())).to(dtype)
        return bool(torch.equal(self._taken.cpu(), expected))

    def _start(self) -> Sequence[Any]:
        return self._begin(self._group, self._given, self._taken, self._index, len(self._call.group))

    def _start_together(self) -> Sequence[Any]:
        return [self._group.barrier()]

    def _once(self, stamps: Stamps, deadline: float, start: Callable[[], Sequence[Any]]) -> None:
        try:
            works = start()
        except RuntimeError as error:
            raise TransportStalledError(str(error).strip().splitlines()[0]) from error
        for work in works:
            stamps.wait(work, deadline)


def _all_reduce(group: Any, given: torch.Tensor, taken: torch.Tensor, index: int, size: int) -> Sequence[Any]:
    return [group.allreduce([given])]


def _all_gather(group: Any, given: torch.Tensor, taken: torch.Tensor, index: int, size: int) -> Sequence[Any]:
    return [group._allgather_base(taken, given)]


def _reduce_scatter(group: Any, given: torch.Tensor, taken: torch.Tensor, index: int, size: int) -> Sequence[Any]:
    return [group._reduce_scatter_base(taken, given)]


def _all_to_all(group: Any, given: torch.Tensor, taken: torch.Tensor, index: int, size: int) -> Sequence[Any]:
    return [group.alltoall_base(taken, given, [], [])]


def _broadcast(group: Any, given: torch.Tensor, taken: torch.Tensor, index: int, size: int) -> Sequence[Any]:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    return [group.broadcast([given], options)]


def _send_recv(group: Any, given: torch.Tensor, taken: torch.Tensor, index: int, size: int) -> Sequence[Any]:
    if given.is_cuda:
        # NCCL would run a rank's receive and its send one after the other, and a ring of them would wait for ever.
        group._start_coalescing(given.device)
    works = [group.recv([taken], (index - 1) % size, 0), group.send([given], (index + 1) % size, 0)]
    return [group._end_coalescing(given.device)] if given.is_cuda else works


_OPERATIONS: dict[str, Callable[[Any, torch.Tensor, torch.Tensor, int, int], Sequence[Any]]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "send_recv": _send_recv,
}
