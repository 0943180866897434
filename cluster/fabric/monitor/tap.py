"""Durations of this rank's collectives on gloo, whoever issues them: Python, torch's reducer in C++, compiled code.

gloo tells nobody when a collective ends. All ways to it meet in c10d's operators, so for the length of one step these get a
kernel that takes the time, in front of the one that does the work: at the dispatch key BackendSelect, which every call of
an operator passes whatever else is switched off (below a DTensor's operator autograd's keys are), and for which nothing
else is registered. Where a Work has a future, that tells the end; where it has none (reduce-scatter, messages, torch 2.13)
whoever waits for it does. Outside of a tapped step nothing is in the way.

No other thread may issue collectives while `start` and `stop` exchange kernels: torch does not guard against it. And a
kernel must let go of Python's lock before it calls the next, as `redispatch` does: gloo's threads take that lock while they
hold locks of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from time import perf_counter, sleep, thread_time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.fabric.monitor.durations import Record, TappedStep

# Operator of c10d -> what it is called here, and the argument whose bytes count, as in parallel/ledger.py.
_OPERATORS: dict[str, tuple[str, str]] = {
    "allreduce_": ("all_reduce", "tensors"),
    "allreduce_coalesced_": ("all_reduce", "tensors"),
    "_allgather_base_": ("all_gather", "output_tensor"),
    "allgather_": ("all_gather", "output_tensors"),
    "allgather_coalesced_": ("all_gather", "output_lists"),
    "allgather_into_tensor_coalesced_": ("all_gather", "outputs"),
    "_reduce_scatter_base_": ("reduce_scatter", "input_tensor"),
    "reduce_scatter_": ("reduce_scatter", "input_tensors"),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", "inputs"),
    "alltoall_base_": ("all_to_all", "input"),
    "alltoall_": ("all_to_all", "input_tensors"),
    "broadcast_": ("broadcast", "tensors"),
    "reduce_": ("reduce", "tensors"),
    "send": ("send", "tensors"),
    "recv_": ("recv", "tensors"),
}
_KEY = "BackendSelect"
_CALL_S = 100e-6
"""What timing one collective costs, most of it unseen from here: gloo's thread must get Python's lock to write the end
down, and the caller it wakes wants the same lock. Measured beside small all-reduces of two ranks (torch 2.13, 2 cores under
load): 20 to 340 us."""
_LATE_END_S = 0.5
"""How long `stop` waits for ends that are due. They are told as soon as gloo's threads have a core and Python's lock."""
_YIELD_S = 50e-6


@dataclass(kw_only=True)
class _Page:
    """One tapped step, as it fills."""

    records: list[Record] = field(default_factory=list)
    works: dict[int, tuple[Any, Record]] = field(default_factory=dict)
    """By identity of a Work that is not complete. It is kept here, so that the identity stays its own."""
    outputs: dict[int, tuple[int, Record]] = field(default_factory=dict)
    """Identity of the Work, and its record, by storage of a result: for those who wait for a tensor and know no Work."""
    unseen: dict[int, Record] = field(default_factory=dict)
    """Issued, and nobody has waited for it where it could be seen (torch's reducer waits in C++)."""
    ends_due: dict[int, tuple[Any, Record]] = field(default_factory=dict)
    """By identity of a Work: its future, as long as that has not told its end."""
    cost_s: float = 0.0


class CollectiveTap:
    """Taps the collectives of this process, one step at a time. Holds what it replaces only between `start` and `stop`."""

    knows_waits = True

    def __init__(self) -> None:
        self._libraries: list[torch.library.Library] = []
        self._work_wait: Any = None
        self._page = _Page()

    def start(self) -> None:
        """From here on collectives are timed. Between steps, on the thread that trains."""
        entered = thread_time()
        page = self._page = _Page()
        self._work_wait = dist.Work.wait  # first, so that `stop` can undo half a start
        c10d = torch.library.Library("c10d", "IMPL")
        functional = torch.library.Library("_c10d_functional", "IMPL")
        self._libraries = [c10d, functional]
        for name in _OPERATORS:
            c10d.impl(name, _timed(name, page), _KEY, with_keyset=True)
        functional.impl("wait_tensor", _timed_wait_tensor(page), _KEY, with_keyset=True)
        setattr(dist.Work, "wait", _timed_wait(self._work_wait, page))  # noqa: B010 - mypy takes it for a final method
        page.cost_s += thread_time() - entered

    def stop(self) -> TappedStep:
        """Puts everything back as it was, and says what has been seen since `start`."""
        entered = thread_time()
        page = self._page
        if self._work_wait is not None:
            setattr(dist.Work, "wait", self._work_wait)  # noqa: B010
            self._work_wait = None
        with ExitStack() as libraries:
            for library in self._libraries:
                libraries.callback(library._destroy)
        self._libraries = []
        page.works.clear()
        _await_ends_due(page)
        _count_unseen_waits(page)
        page.cost_s += thread_time() - entered
        return TappedStep(records=tuple(page.records), cost_s=page.cost_s)


def _timed(name: str, page: _Page) -> Callable[..., Any]:
    """A kernel of one operator that calls the next one, and writes a record."""
    kind, measured = _OPERATORS[name]
    operator = getattr(torch.ops.c10d, name).default
    below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)
    names = [argument.name for argument in operator._schema.arguments]
    group_at, bytes_at = names.index("process_group"), names.index(measured)

    def call(keyset: Any, *args: Any) -> Any:
        started = perf_counter()
        result = operator.redispatch(keyset & below, *args)
        returned = thread_time()  # not the wall's: on a busy machine others have their turn in between
        # The collective is under way, and whoever called it must get its Work, whatever cannot be noted of it.
        with suppress(Exception):
            record = Record(
                group=dist.ProcessGroup.unbox(args[group_at]).group_name,
                kind=kind,
                num_bytes=sum(_num_bytes(tensor) for tensor in _tensors(args[bytes_at])),
                started=started,
            )
            work = dist.Work.unbox(result[-1] if isinstance(result, tuple) else result)
            _note(page, record, work, _tensors(args[0]))
        page.cost_s += thread_time() - returned + _CALL_S
        return result

    return call


def _note(page: _Page, record: Record, work: Any, outputs: list[Tensor]) -> None:
    page.records.append(record)
    page.unseen[id(record)] = record
    page.works[id(work)] = (work, record)
    _watch_end(work, record, page)
    for output in outputs:
        if output.layout == torch.strided:  # others have no storage, and functional collectives do not take them
            page.outputs[_storage_of(output)] = (id(work), record)


def _num_bytes(tensor: Tensor) -> int:
    """Of its data; of a sparse tensor with its places."""
    if tensor.layout == torch.sparse_coo:
        return tensor._values().nbytes + tensor._indices().nbytes
    return tensor.numel() * tensor.element_size()


def _watch_end(work: Any, record: Record, page: _Page) -> None:
    """Learns of the end from the Work's future, on whatever thread completes it; where it has none, from who waits."""
    try:
        future = work.get_future()
    except RuntimeError:
        return
    key = id(work)
    page.ends_due[key] = (future, record)

    def ended(_: Any) -> None:
        record.seconds = perf_counter() - record.started
        page.works.pop(key, None)
        page.ends_due.pop(key, None)

    future.add_done_callback(ended)


def _timed_wait(wait: Any, page: _Page) -> Callable[..., Any]:
    """`Work.wait` that takes the time."""

    def call(work: Any, *args: Any, **keywords: Any) -> Any:
        _, record = page.works.get(id(work), (None, None))
        started = perf_counter()
        result = wait(work, *args, **keywords)
        if record is not None:
            _waited(page, record, started)
            page.works.pop(id(work), None)
        return result

    return call


def _timed_wait_tensor(page: _Page) -> Callable[..., Any]:
    """`_c10d_functional::wait_tensor` that takes the time: what functional collectives and compiled code wait with."""
    operator = torch.ops._c10d_functional.wait_tensor.default
    below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)

    def call(keyset: Any, tensor: Tensor) -> Any:
        started = perf_counter()
        result = operator.redispatch(keyset & below, tensor)
        with suppress(Exception):
            key, record = page.outputs.pop(_storage_of(tensor), (0, None))
            page.works.pop(key, None)
            if record is not None:
                _waited(page, record, started)
        return result

    return call


def _tensors(given: Any) -> list[Tensor]:
    """Of an argument that is a tensor, a list of them, or a list of lists."""
    if isinstance(given, Tensor):
        return [given]
    return [tensor for each in given for tensor in _tensors(each)]


def _storage_of(tensor: Tensor) -> int:
    """What torch's own registry of Works goes by."""
    return tensor.untyped_storage()._cdata


def _waited(page: _Page, record: Record, started: float) -> None:
    now = perf_counter()
    record.waited_s += now - started
    if record.seconds is None:
        record.seconds = now - record.started
    page.unseen.pop(id(record), None)


def _await_ends_due(page: _Page) -> None:
    """A future is done, and wakes who waits for it in C++, before gloo's thread gets Python's lock to say so here; its Work
    completes only after that. Where one is done, the thread gets the lock."""
    deadline = perf_counter() + _LATE_END_S
    for future, record in list(page.ends_due.values()):
        while record.seconds is None and future.done() and perf_counter() < deadline:
            sleep(_YIELD_S)


def _count_unseen_waits(page: _Page) -> None:
    """Nobody was seen to wait for these. The last of a group was issued when there was nothing left to do before the end
    of all of them: so long the caller stood still."""
    groups: dict[str, list[Record]] = {}
    for record in page.unseen.values():
        groups.setdefault(record.group, []).append(record)
    for members in groups.values():
        last = members[-1]
        ends = [member.started + member.seconds for member in members if member.seconds is not None]
        last.waited_s += max(0.0, max(ends, default=last.started) - last.started)
