"""What this rank sends and receives while somebody watches: every collective and every message, with its bytes.

Torch's dispatcher shows each communication operator to a mode that is switched on, whoever issues it: our own
collectives, DDP's reducer, FSDP2's hooks, the messages of a pipeline, pickled objects. On CPUs autograd runs a backward on
the thread that called it; for a device it has threads of its own, and gives them the modes of the caller (the dispatch
modes are part of `at::ThreadLocalState`, which a graph task carries). Not seen: other threads, such as the one that
writes checkpoints, and what a compiled region issues from inside a fused kernel. Compile off before counting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.world import World

# Operator (of c10d, or its namesake of _c10d_functional) -> kind, and the argument whose bytes count.
_OPERATORS: dict[str, tuple[str, str | None]] = {
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
    "gather_": ("gather", "input_tensors"),
    "scatter_": ("scatter", "output_tensors"),
    "send": ("send", "tensors"),
    "recv_": ("recv", "tensors"),
    "recv_any_source_": ("recv", "tensors"),
    "barrier": ("barrier", None),
    "monitored_barrier_": ("barrier", None),
}
_FUNCTIONAL: dict[str, tuple[str, str | None]] = {
    "all_reduce": ("all_reduce", "input"),
    "all_reduce_": ("all_reduce", "input"),
    "all_reduce_coalesced": ("all_reduce", "inputs"),
    "all_reduce_coalesced_": ("all_reduce", "inputs"),
    "all_gather_into_tensor": ("all_gather", "input"),
    "all_gather_into_tensor_out": ("all_gather", "input"),
    "all_gather_into_tensor_coalesced": ("all_gather", "inputs"),
    "reduce_scatter_tensor": ("reduce_scatter", "input"),
    "reduce_scatter_tensor_out": ("reduce_scatter", "input"),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", "inputs"),
    "all_to_all_single": ("all_to_all", "input"),
    "broadcast": ("broadcast", "input"),
    "broadcast_": ("broadcast", "input"),
    "isend": ("send", "tensor"),
    "irecv": ("recv", "tensor"),
}
_GROUP_ARGUMENTS = ("process_group", "group_name")
_WORLD_DESCRIPTION = "default_pg"
_NO_DESCRIPTION = "undefined"


@dataclass(frozen=True, kw_only=True, order=True)
class LedgerKey:
    """What kind of communication, among whom, of what type of numbers."""

    axis: str
    """The mesh axis whose group it was; "world" for all ranks, "control" for World's group of objects."""
    kind: str
    """all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, send, recv, barrier, ..."""
    dtype: str
    """As torch names it, without "torch."; "none" for a barrier."""


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """One kind of communication of one rank: how often, and how many bytes in all.

    Bytes are the payload, whatever the algorithm makes of it on the wire: of the tensor for an all-reduce, a broadcast,
    a send and a receive; of the gathered result for an all-gather; of the summands (this rank's whole input) for a
    reduce-scatter; of this rank's input for an all-to-all, its own part included; of what this rank gives to a gather
    and gets from a scatter; nothing for a barrier.
    """

    key: LedgerKey
    count: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A number over the ranks: ranks without such a row count as zero."""

    least: int
    most: int
    total: int

    @property
    def is_even(self) -> bool:
        """All ranks have the same."""
        return self.least == self.most


@dataclass(frozen=True, kw_only=True)
class MergedRow:
    """One kind of communication over all ranks."""

    key: LedgerKey
    count: Spread
    num_bytes: Spread


class CommunicationLedger:
    """Writes down what this rank issues inside `with ledger.step():`. It changes nothing and talks to nobody itself."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._entries: dict[LedgerKey, tuple[int, int]] = {}

    @contextmanager
    def step(self) -> Iterator[None]:
        """Starts a new page, and records until the end of the block, by exception or not."""
        self._entries = {}
        with _Watch(self):
            yield

    @property
    def rows(self) -> tuple[LedgerRow, ...]:
        """The last page, in the order of axis, kind and type."""
        return tuple(
            LedgerRow(key=key, count=count, num_bytes=num_bytes)
            for key, (count, num_bytes) in sorted(self._entries.items())
        )

    def add(self, group: dist.ProcessGroup, kind: str, dtype: str, num_bytes: int) -> None:
        """One more communication on `group`; none where nobody else is in it."""
        if group.size() == 1:
            return
        key = LedgerKey(axis=self._axis_of(group), kind=kind, dtype=dtype)
        count, before = self._entries.get(key, (0, 0))
        self._entries[key] = (count + 1, before + num_bytes)

    def _axis_of(self, group: dist.ProcessGroup) -> str:
        description = group.group_desc
        if description == _WORLD_DESCRIPTION:
            return "world"
        control = self._world.control_group
        if control is not None and group.group_name == control.group_name:
            return "control"
        if description == _NO_DESCRIPTION:
            return f"ranks {','.join(map(str, dist.get_process_group_ranks(group)))}"
        return description.removeprefix("mesh_")  # as init_device_mesh calls them


def merge(pages: Sequence[Sequence[LedgerRow]]) -> tuple[MergedRow, ...]:
    """The pages of all ranks as one: where stages of a pipeline differ, least and most differ."""
    by_rank = [{row.key: row for row in page} for page in pages]
    keys = sorted({key for page in by_rank for key in page})
    return tuple(
        MergedRow(
            key=key,
            count=spread([page[key].count if key in page else 0 for page in by_rank]),
            num_bytes=spread([page[key].num_bytes if key in page else 0 for page in by_rank]),
        )
        for key in keys
    )


def spread(values: Sequence[int]) -> Spread:
    """Least, most and total."""
    return Spread(least=min(values), most=max(values), total=sum(values))


class _Watch(TorchDispatchMode):
    """Shows a ledger every communication operator that goes through the dispatcher."""

    def __init__(self, ledger: CommunicationLedger) -> None:
        super().__init__()
        self._ledger = ledger

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # A DTensor's operator may hide collectives: let it run first, with this mode on, and see those.
            return NotImplemented
        if func.namespace == "c10d" or func.namespace.startswith("_c10d_functional"):
            self._record(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _record(self, func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        where = next((name for name in _GROUP_ARGUMENTS if name in given), None)
        if where is None:  # waits for a communication that has been seen, or checks a tensor
            return
        group = _as_group(given[where])
        name = func._schema.name.split("::")[1]
        if name == "batch_p2p_ops":
            for op, tensor in zip(given["op_list"], given["tensors"], strict=True):
                self._ledger.add(group, op.removeprefix("i"), _dtype_of([tensor]), _bytes_of([tensor]))
            return
        functional = func.namespace != "c10d"
        # One that the tables do not know yet must not go unseen: it counts by its name, with all its tensors.
        kind, argument = (_FUNCTIONAL if functional else _OPERATORS).get(name, (name, "*"))
        source = list(given.values()) if argument == "*" else given.get(argument or "", [])
        tensors = [leaf for leaf in tree_leaves(source) if isinstance(leaf, Tensor)]
        num_bytes = _bytes_of(tensors) * (given["group_size"] if functional and kind == "all_gather" else 1)
        self._ledger.add(group, kind, _dtype_of(tensors), num_bytes)


def _as_group(given: Any) -> dist.ProcessGroup:
    if isinstance(given, str):
        return dist.distributed_c10d._resolve_process_group(cast(Any, given))
    return given if isinstance(given, dist.ProcessGroup) else dist.ProcessGroup.unbox(given)


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _dtype_of(tensors: Sequence[Tensor]) -> str:
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    return "+".join(kinds) or "none"
