"""A copy of what one rank writes of a checkpoint, which training no longer touches.

Training is held up only by this copy, so it is kept small and cheap: what several ranks hold is copied by the one alone
that writes it (see `shares`), and the buffers in CPU memory are used again at each save.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from parallel.checkpoint.pieces import FlatState
from parallel.placement import Piece

Moment = dict[torch.device, torch.cuda.Event]
"""A point in the work of each GPU that holds some of a state: see `moment_of`."""


def moment_of(state: FlatState) -> Moment:
    """The point at which all that was asked of the GPUs so far, and so the writing of `state`, will be done.

    For the thread that does the asking; work that it asks for afterwards does not count. Empty without GPUs.
    """
    devices = {value.local.device for value in state.values() if isinstance(value, Piece)}
    return {device: torch.cuda.current_stream(device).record_event() for device in devices if device.type == "cuda"}


class StagingBuffers:
    """CPU copies of one rank's share. The buffers live as long as this object and are used again at each save."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @torch.no_grad()
    def copy(self, state: FlatState, moment: Moment) -> FlatState:
        """`state` with every piece replaced by a plain CPU copy of its local tensor; objects are deep-copied.

        Copies from a GPU start at `moment` (which has all GPUs that `state` is on), and run on a stream of their own,
        beside whatever the GPU does after it. Nothing may write to `state` before this returns, once the copy is
        complete. The result is valid until the same keys are copied again.
        """
        staged: FlatState = {}
        on_gpu: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for key, value in state.items():
            if not isinstance(value, Piece):
                staged[key] = copy.deepcopy(value)
                continue
            local = value.local
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
        if isinstance(value, Piece) and value.local.untyped_storage().data_ptr() in owned
    }


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor; a plain tensor itself. Detached."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
