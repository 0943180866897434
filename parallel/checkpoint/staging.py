"""What one rank writes of a checkpoint, and a copy of it that training no longer touches.

Training is held up only by this copy, so it is kept small and cheap: a tensor that several ranks hold whole (every
one under DDP) is copied and written by one of them alone, and the buffers in CPU memory are used again at each save.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from parallel.world import World

FlatState = dict[str, Any]
_ENVELOPE_BYTES = 1500
"""About what each entry costs in a file beyond its own bytes. So small entries are shared out evenly too."""


def flatten(state: Mapping[str, Any]) -> FlatState:
    """Nested mappings as one dict; keys are joined by dots, leaves (all that is no mapping) stay as they are."""
    flat: FlatState = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix else str(key), inner)
        elif prefix in flat:
            raise ValueError(f"two entries of the state are called {prefix!r}")
        else:
            flat[prefix] = value

    visit("", state)
    return flat


class WriteShares:
    """Decides, alike on all ranks, which of them writes an entry that more than one holds."""

    def __init__(self) -> None:
        self._signature: int | None = None
        self._mine: frozenset[str] = frozenset()

    def mine(self, state: FlatState, world: World) -> FlatState:
        """This rank's share: its own shards of sharded tensors, and about 1/N of what all N ranks hold whole.

        A collective over the world. Keys are exchanged only when some rank's differ from those at the last save.
        """
        whole = {key: _num_bytes(value) for key, value in state.items() if not isinstance(value, DTensor)}
        signature = zlib.crc32(repr(sorted(whole.items())).encode())
        changed = any(world.all_gather_object(signature != self._signature))
        if changed:
            self._mine = frozenset(assign_writers(world.all_gather_object(whole))[world.rank])
            self._signature = signature
        return {key: value for key, value in state.items() if key in self._mine or isinstance(value, DTensor)}


def assign_writers(held: list[dict[str, int]]) -> list[set[str]]:
    """For each rank the keys that it writes. `held[rank]` has the size in bytes of each entry that the rank holds.

    Each key gets one writer among its holders: the largest entries first, each to the least burdened.
    """
    holders: dict[str, list[int]] = {}
    for rank, keys in enumerate(held):
        for key in keys:
            holders.setdefault(key, []).append(rank)
    burden = [0] * len(held)
    shares: list[set[str]] = [set() for _ in held]
    for key, ranks in sorted(holders.items(), key=lambda entry: (-held[entry[1][0]][entry[0]], entry[0])):
        writer = min(ranks, key=lambda rank: (burden[rank], rank))
        burden[writer] += held[writer][key] + _ENVELOPE_BYTES
        shares[writer].add(key)
    return shares


Moment = dict[torch.device, torch.cuda.Event]
"""A point in the work of each GPU that holds some of a state: see `moment_of`."""


def moment_of(state: FlatState) -> Moment:
    """The point at which all that was asked of the GPUs so far, and so the writing of `state`, will be done.

    For the thread that does the asking; work that it asks for afterwards does not count. Empty without GPUs.
    """
    devices = {local_part(value).device for value in state.values() if isinstance(value, torch.Tensor)}
    return {device: torch.cuda.current_stream(device).record_event() for device in devices if device.type == "cuda"}


class StagingBuffers:
    """CPU copies of one rank's share. The buffers live as long as this object and are used again at each save."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @torch.no_grad()
    def copy(self, state: FlatState, moment: Moment) -> FlatState:
        """`state` with every tensor replaced by a plain CPU copy of its local part; other leaves are deep-copied.

        Copies from a GPU start at `moment` (which has all GPUs that `state` is on), and run on a stream of their own,
        beside whatever the GPU does after it. Nothing may write to `state` before this returns, once the copy is
        complete. The result is valid until the same keys are copied again.
        """
        staged: FlatState = {}
        on_gpu: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for key, value in state.items():
            if not isinstance(value, torch.Tensor):
                staged[key] = copy.deepcopy(value)
                continue
            local = local_part(value)
            staged[key] = self._buffer(key, local)
            if local.is_cuda:
                on_gpu.setdefault(local.device, []).append((staged[key], local))
            else:
                staged[key].copy_(local)
        for device, pairs in on_gpu.items():
            with torch.cuda.stream(self._stream(device)):
                self._stream(device).wait_event(moment[device])
                for buffer, local in pairs:
                    buffer.copy_(local, non_blocking=True)
        # `state` holds the sources until here, so their memory cannot be given to anything else under way.
        for device in on_gpu:
            self._stream(device).synchronize()
        return staged

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        """Where copies from a GPU run. Not a thread's default: that is the one on which training computes."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _buffer(self, key: str, local: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            # Page-locked memory lets the GPU copy at full speed, and without the CPU's help.
            buffer = torch.empty(local.shape, dtype=local.dtype, device="cpu", pin_memory=local.is_cuda)
            self._buffers[key] = buffer
        return buffer


def changed_only_by(optimizers: Sequence[Optimizer], state: FlatState) -> set[str]:
    """The keys of `state` whose memory is a parameter of one of the optimizers, or its moments: what only `step`
    writes to."""
    owned = set()
    for optimizer in optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        entries = [entry for parameter in parameters for entry in optimizer.state.get(parameter, {}).values()]
        for tensor in (*parameters, *entries):
            if isinstance(tensor, torch.Tensor):
                owned.add(local_part(tensor).untyped_storage().data_ptr())
    return {
        key
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and local_part(value).untyped_storage().data_ptr() in owned
    }


class StagedPlanner(DefaultSavePlanner):
    """Plans by the live state (its shapes and shards, which never change) and takes the bytes from its staged copy."""

    def __init__(self, staged: FlatState) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._staged = staged

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._staged[index.fqn]


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor; a plain tensor itself. Detached."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _num_bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
