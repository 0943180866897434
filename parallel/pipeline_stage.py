"""One stage of a pipeline as torch's schedules drive it: what is received, computed, kept and sent for a micro batch.

torch's schedules call the methods of a stage by name. Their own stage (`PipelineStage`) is not used, since it holds a
buffer for every micro batch of the step at once, calls the module itself (a stage here is any function), and reads the
parameters' gradients off modules that FSDP2 may just have resharded, whose weights it then skips without a word.

Shape suffixes are absent: a stage does not know what its hidden states mean.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.distributed.pipelining.stage import _PipelineStageBase

from parallel.errors import ParallelError
from parallel.mesh import Axis

Mark = float | torch.cuda.Event


@dataclass(frozen=True, kw_only=True)
class StagePart:
    """One stage, held by this rank.

    `module` holds the stage's parameters; it may be an FSDP2 root. `forward(input, **kwargs)` computes one micro batch:
    the first stage's input is tokens, any other's the hidden states of the stage before. It returns hidden states, of one
    shape and dtype throughout the pipeline, or on the last stage the float32 scalar whose gradient is wanted.
    """

    index: int
    module: nn.Module
    forward: Callable[..., Tensor]


class Stopwatch:
    """Takes the time on the device: on CUDA by events, which nobody waits for until the times are read."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self.spans: list[tuple[Mark, Mark]] = []

    def now(self) -> Mark:
        """This moment in the order of the device's work."""
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def running(self) -> Iterator[None]:
        """Adds what happens inside to `spans`."""
        started = self.now()
        yield
        self.spans.append((started, self.now()))


def seconds_between(start: Mark, end: Mark) -> float:
    """Seconds between two marks of one stopwatch; on CUDA it waits for the second."""
    if isinstance(start, float):
        assert isinstance(end, float)
        return end - start
    assert not isinstance(end, float)
    end.synchronize()
    return start.elapsed_time(end) / 1000


@dataclass(frozen=True, kw_only=True)
class _Deferred:
    """What the weights' backward of one micro batch needs; no `groups`: nothing of the backward has run yet."""

    out: Tensor
    grad: Tensor | None
    groups: list[dict[str, Any]] | None


@dataclass(kw_only=True)
class _InFlight:
    """Tensors of the micro batches under way, each by its micro batch's number and gone as soon as it was used."""

    received: dict[int, Tensor] = field(default_factory=dict)
    computed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    grads_of_output: dict[int, Tensor] = field(default_factory=dict)
    grads_of_input: dict[int, Tensor] = field(default_factory=dict)
    deferred: dict[int, _Deferred] = field(default_factory=dict)


class Stage(_PipelineStageBase):
    """What `parallel.pipeline.Pipeline` gives to torch's schedule. The names of its methods are torch's."""

    def __init__(
        self,
        part: StagePart,
        *,
        num_stages: int,
        axis: Axis,
        hidden: Tensor,
        device: torch.device,
        stopwatch: Stopwatch,
        split_backward: bool,
        reshard: bool,
    ) -> None:
        super().__init__(part.module, part.index, num_stages, device, axis.group)
        self._part = part
        self._axis = axis
        self._hidden = hidden
        self._stopwatch = stopwatch
        self._split_backward = split_backward
        self._reshard = reshard
        self._inputs: Sequence[Tensor] = ()
        self._kwargs: Sequence[dict[str, Tensor]] = ()
        self._in_flight = _InFlight()
        self.args_recv_info = {0: ()}  # torch looks here for stages that talk to others than their neighbours

    def begin(self, inputs: Sequence[Tensor], kwargs: Sequence[dict[str, Tensor]]) -> None:
        """Takes the micro batches of one step. FSDP2 then keeps gradients on this rank until `perform_reduce_grad`."""
        self._inputs, self._kwargs = inputs, kwargs
        if isinstance(self.submod, FSDPModule):
            self.submod.set_is_last_backward(False)
            self.submod.set_requires_gradient_sync(False)
            self.submod.set_reshard_after_backward(self._reshard)

    def end(self) -> None:
        """Forgets the micro batches."""
        self._inputs, self._kwargs = (), ()

    def compute(self, x: Tensor, kwargs: dict[str, Tensor]) -> Tensor:
        """The stage's forward of one micro batch. Raises `ParallelError` when it is not what the next stage expects."""
        out = self._part.forward(x, **kwargs)
        expected = (torch.Size(()), torch.float32) if self.is_last else (self._hidden.shape, self._hidden.dtype)
        if (out.shape, out.dtype) != expected:
            raise ParallelError(
                f"pipeline stage {self.stage_index} of {self.num_stages} returned {tuple(out.shape)} {out.dtype}, and "
                f"{tuple(expected[0])} {expected[1]} is agreed: all micro batches of a pipeline have one shape"
            )
        return out

    def empty_hidden(self) -> Tensor:
        """Room for what passes between stages."""
        return torch.empty(self._hidden.shape, dtype=self._hidden.dtype, device=self.device)

    def rank_of(self, stage_index: int) -> int:
        """The world rank that holds a stage."""
        return self._axis.ranks[self.stage_index_to_group_rank[stage_index]]

    # From here on: what torch's schedules call.

    def clear_runtime_states(self) -> None:
        self._in_flight = _InFlight()

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_first:
            return []
        return [self._receive_into(self._in_flight.received, fwd_chunk_id, self.stage_index - 1)]

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_last:
            return []
        return [self._send(self._in_flight.computed[fwd_chunk_id][1].detach(), self.stage_index + 1)]

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_last:
            return []
        return [self._receive_into(self._in_flight.grads_of_output, bwd_chunk_id, self.stage_index + 1)]

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_first:
            return []
        return [self._send(self._in_flight.grads_of_input.pop(bwd_chunk_id), self.stage_index - 1)]

    def set_local_fwd_input(self, prev_stage_outputs: Tensor, mb_index: int) -> None:
        self._in_flight.received[mb_index] = prev_stage_outputs.detach()

    def get_local_bwd_output(self, mb_index: int) -> Tensor:
        return self._in_flight.grads_of_input.pop(mb_index)

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        self._in_flight.grads_of_output[mb_index] = next_stage_bwd_outputs

    def forward_one_chunk(self, fwd_chunk_id: int, *_: Any, **__: Any) -> Tensor:
        if self.is_first:
            x = self._inputs[fwd_chunk_id]
        else:
            x = self._in_flight.received.pop(fwd_chunk_id).requires_grad_()
        with self._stopwatch.running():
            out = self.compute(x, self._kwargs[fwd_chunk_id])
        self._in_flight.computed[fwd_chunk_id] = (x, out)
        return out

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        x, out = self._in_flight.computed.pop(bwd_chunk_id)
        grad = None if self.is_last else self._in_flight.grads_of_output.pop(bwd_chunk_id)
        with self._stopwatch.running():
            if full_backward or not self._split_backward:
                self._backward(out, grad)
            else:
                # Nobody waits for the gradient of tokens, so the first stage may do all of it later.
                groups = None if self.is_first else self._backward_of_input(x, out, grad)
                self._in_flight.deferred[bwd_chunk_id] = _Deferred(out=out, grad=grad, groups=groups)
        if not self.is_first:
            self._in_flight.grads_of_input[bwd_chunk_id] = torch.zeros_like(x) if x.grad is None else x.grad
            x.grad = None

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        deferred = self._in_flight.deferred.pop(bwd_chunk_id, None)
        if deferred is None:
            return
        with self._stopwatch.running():
            if deferred.groups is None:
                self._backward(deferred.out, deferred.grad)
            else:
                self._gather_parameters()
                stage_backward_weight(self.submod.parameters(), deferred.groups)
                if isinstance(self.submod, FSDPModule):
                    # Its hooks are on the inputs' way through the graph. Without this it would add up micro batches in
                    # the parameters' dtype, and keep what was gathered.
                    fully_shard.state(self.submod)._root_post_backward_final_callback()  # type: ignore[attr-defined]

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        with self._stopwatch.running():
            super().perform_reduce_grad(grad_scale_factor)

    def _backward(self, out: Tensor, grad: Tensor | None) -> None:
        if out.requires_grad:  # not so where all parameters up to here are frozen
            torch.autograd.backward(out, grad)

    def _backward_of_input(self, x: Tensor, out: Tensor, grad: Tensor | None) -> list[dict[str, Any]]:
        """Leaves the input's gradient in `x.grad`; returns what the weights' gradients can be made of later."""
        # torch finds the weights in the graph by the parameters that the module holds right now, and under FSDP2 those
        # are the graph's only while they are gathered.
        self._gather_parameters()
        grads = None if grad is None else [grad]
        return stage_backward_input([out], grads, [x], self.submod.parameters())[1]

    def _gather_parameters(self) -> None:
        sharded = [module for module in self.submod.modules() if isinstance(module, FSDPModule)]
        for handle in [module.unshard(async_op=True) for module in sharded]:
            if handle is not None:
                handle.wait()

    def _receive_into(self, place: dict[int, Tensor], micro_batch: int, stage_index: int) -> dist.P2POp:
        place[micro_batch] = self.empty_hidden()
        return dist.P2POp(dist.irecv, place[micro_batch], self.rank_of(stage_index), self.group)

    def _send(self, tensor: Tensor, stage_index: int) -> dist.P2POp:
        return dist.P2POp(dist.isend, tensor.contiguous(), self.rank_of(stage_index), self.group)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return []  # `Pipeline` has connected all neighbours, in an order that cannot hang

    def _prepare_forward_infra(self, *_: Any, **__: Any) -> None:
        """Shapes are known beforehand, so nothing is inferred by running the model."""

    def _prepare_backward_infra(self, *_: Any, **__: Any) -> None:
        """As above."""

    def _create_grad_recv_info(self, *_: Any, **__: Any) -> tuple[()]:
        return ()
