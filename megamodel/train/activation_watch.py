"""What the blocks of a running model keep for their backward, as its allocator counts it, beside the formula."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megamodel.model.decoder import Decoder
from megamodel.train.activation_memory import is_treated, offload_of
from megamodel.train.batch import TokenBatch
from megamodel.train.build import BuiltModel
from megamodel.train.callbacks.base import Callback
from megamodel.train.communication_facts import RunShape
from megamodel.train.config import ActivationMemoryConfig
from megamodel.train.job import TrainingJob
from megamodel.train.memory import report_activations
from megamodel.train.step import StepResult, TrainStep

_WATCHED_CALL = 2
"""The first step of a start may compile, and so allocate what has nothing to do with activations."""


class ActivationWatch:
    """A `Step` that does what another does, and measures the activation mode in its second call. Every rank has one; the
    `callbacks` of each then hear of the event "activation_memory": bytes that this rank's blocks keep of one micro batch,
    and what that saves against keeping everything, predicted and measured (None where this machine's allocator says nothing).

    The measurement runs the first block of each kind a second time, keeping everything and uncompiled, and talks to other
    ranks as that block does.
    """

    def __init__(self, job: TrainingJob, step: TrainStep, callbacks: Sequence[Callback], *, first_step: int) -> None:
        self._job = job
        self._step = step
        self._callbacks = callbacks
        self._first_step = first_step
        self._calls = 0

    def __call__(
        self, micro_batches: Sequence[TokenBatch], *, lr_factor: float, stop_requested: Callable[[], bool]
    ) -> StepResult:
        """See `TrainStep`."""
        self._calls += 1
        if self._calls != _WATCHED_CALL:
            return self._step(micro_batches, lr_factor=lr_factor, stop_requested=stop_requested)
        built, memory = self._step.built, self._job.train.activation_memory
        with measured_blocks(built.parts, memory, built.mesh.world.device) as measured:
            result = self._step(micro_batches, lr_factor=lr_factor, stop_requested=stop_requested)
        self._tell(built, measured)
        return result

    def _tell(self, built: BuiltModel, measured: BlockMeasurements) -> None:
        shape = RunShape(
            model=self._job.model,
            layout=built.mesh.layout,
            parallel=self._job.parallel,
            train=self._job.train,
            seq_len=self._job.data.seq_len,
            rows=built.micro_batch_size,
            document_mask=self._job.data.document_mask,
        )
        on_cuda = built.mesh.world.device.type == "cuda"
        predicted = report_activations(shape, pp_rank=built.mesh.coordinate("pp"), fused_kernels=on_cuda)
        kept, whole = measured.total(built.parts, self._job.train.activation_memory)
        saved = None if kept is None or whole is None else whole - kept
        details = {
            "message": f"activation memory {predicted.mode}: a rank's blocks keep {_mib(kept)} of a micro batch (predicted "
            f"{_mib(predicted.kept)}), which saves {_mib(saved)} (predicted {_mib(predicted.saved)})",
            "step": self._first_step + _WATCHED_CALL - 1,
            "mode": predicted.mode,
            "kept_bytes_predicted": predicted.kept,
            "kept_bytes_measured": kept,
            "saved_bytes_predicted": predicted.saved,
            "saved_bytes_measured": saved,
        }
        for callback in self._callbacks:
            callback.on_event("activation_memory", **details)


def _mib(num_bytes: int | None) -> str:
    return "an unknown amount" if num_bytes is None else f"{num_bytes / 2**20:,.1f} MiB"


@dataclass(frozen=True, kw_only=True)
class BlockMeasurement:
    """Bytes that one call of one block left behind, besides its result. `whole`: with nothing recomputed or moved."""

    kept: int | None
    whole: int | None


class BlockMeasurements:
    """One measurement for each kind of block: dense or MoE, treated or not."""

    def __init__(self) -> None:
        self.by_kind: dict[tuple[bool, bool], BlockMeasurement] = {}

    def total(self, parts: Sequence[Decoder], memory: ActivationMemoryConfig) -> tuple[int | None, int | None]:
        """Kept and whole bytes of all blocks, as if all of a kind were like the one measured."""
        found = [self.by_kind.get(_kind(layer, block, memory)) for layer, block in _blocks(parts)]
        kept, whole = [], []
        for one in found:
            if one is None or one.kept is None or one.whole is None:
                return None, None
            kept.append(one.kept)
            whole.append(one.whole)
        return sum(kept), sum(whole)


@contextmanager
def measured_blocks(
    parts: Sequence[Decoder], memory: ActivationMemoryConfig, device: torch.device
) -> Iterator[BlockMeasurements]:
    """While the context lasts, measures the first training forward of one block of each kind."""
    measurements = BlockMeasurements()
    before: dict[nn.Module, Any] = {}
    kinds = set()
    for part in parts:
        for layer, block in _blocks([part]):
            kind = _kind(layer, block, memory)
            if kind not in kinds:
                kinds.add(kind)
                before[block] = block.__dict__.get("forward")
                block.forward = _measuring(part, block, kind, measurements, device)
    try:
        yield measurements
    finally:
        for block, forward in before.items():
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def allocated_bytes(device: torch.device) -> int | None:
    """Bytes that this process's allocator has given out: on CUDA torch's, else the C library's, where that is glibc."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    mallinfo.restype = _MallInfo
    found = mallinfo()
    return int(found.uordblks) + int(found.hblkhd)


class _MallInfo(ctypes.Structure):
    """struct mallinfo2 of glibc 2.33 and later."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def _measuring(
    part: Decoder, block: nn.Module, kind: tuple[bool, bool], measurements: BlockMeasurements, device: torch.device
) -> Callable[..., Any]:
    forward = block.forward

    def measuring(*args: Any) -> Any:
        if not torch.is_grad_enabled() or kind in measurements.by_kind:
            return forward(*args)
        # A copy of the input, since only what is made during the call is counted, and a block may keep its input.
        whole = _left_behind(lambda: type(block).forward(block, args[0].clone(), *args[1:]), part, device)[1]
        result, kept = _left_behind(lambda: forward(args[0].clone(), *args[1:]), part, device)
        measurements.by_kind[kind] = BlockMeasurement(kept=kept, whole=whole)
        return result

    return measuring


def _left_behind(call: Callable[[], Any], part: Decoder, device: torch.device) -> tuple[Any, int | None]:
    offload = offload_of(part)
    moved = offload.moved_bytes if offload else 0
    gc.collect()  # else garbage of before may go during the call
    before = allocated_bytes(device)
    result = call()
    if offload:
        offload.settle()
    after = allocated_bytes(device)
    if before is None or after is None:
        return result, None
    kept = after - before - result[0].untyped_storage().nbytes()
    if offload and device.type == "cpu":  # stands for memory that is not the device's
        kept -= offload.moved_bytes - moved
    return result, max(0, kept)


def _blocks(parts: Sequence[Decoder]) -> list[tuple[int, nn.Module]]:
    return [(int(name), block) for part in parts for name, block in part.layers.named_children()]


def _kind(layer: int, block: nn.Module, memory: ActivationMemoryConfig) -> tuple[bool, bool]:
    return getattr(block, "moe", None) is not None, is_treated(layer, memory)
