"""Pipeline parallelism: each rank of an axis holds some of the model's stages, and micro batches pass through all.

The order in which a rank computes is one of torch's schedules (`torch.distributed.pipelining`):

- `gpipe` (Huang et al. 2019): all forwards, then all backwards. `1f1b` (Narayanan et al. 2019, PipeDream-flush): no
  more micro batches under way than stages to come. One stage a rank.
- `interleaved_1f1b` (Narayanan et al. 2021, section 2.2): rank r holds stages r, r + pp, r + 2 pp, ...
  `interleaved_zero_bubble` (Qi et al. 2023, ZB1P): the weights' gradients wait, and fill idle time.
- `zbv` (Qi et al. 2023, section 6) and `dualpipev` (DeepSeek-V3, section 3.2.1, halved): rank r holds stages r and
  2 pp - 1 - r, so that the first rank has the loss too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import schedules as torch_schedules

from parallel.config import PipelineSchedule
from parallel.errors import ParallelError
from parallel.mesh import Axis
from parallel.pipeline_stage import Mark, Stage, StagePart, Stopwatch, seconds_between
from parallel.stages import SINGLE_STAGE_SCHEDULES, V_SCHEDULES, stages_of_rank

__all__ = ["SPLIT_BACKWARD_IS_SOUND", "Pipeline", "PipelineTimes", "StagePart", "check_schedule"]

_SCHEDULES: dict[str, Any] = {
    "gpipe": torch_schedules.ScheduleGPipe,
    "1f1b": torch_schedules.Schedule1F1B,
    "interleaved_1f1b": torch_schedules.ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
    "dualpipev": torch_schedules.ScheduleDualPipeV,
}

SPLIT_BACKWARD_IS_SOUND = torch.__version__ >= "2.13"
"""Whether this torch can compute the weights' gradients apart from the inputs'. Before 2.13 it added up the gradients of
an operation's several outputs, and counted a weight twice that a stage uses twice."""


@dataclass(frozen=True, kw_only=True)
class PipelineTimes:
    """Where one rank's time went in one `Pipeline.train`. On CUDA the first look waits for the device to be done."""

    spans: tuple[tuple[Mark, Mark], ...]
    """Start and end of each forward, backward and reduction of gradients of a stage on this rank."""
    whole: tuple[Mark, Mark]

    @property
    def compute_s(self) -> float:
        """Seconds inside this rank's stages, their own collectives among them."""
        return sum(seconds_between(start, end) for start, end in self.spans)

    @property
    def total_s(self) -> float:
        """Seconds from the first micro batch's start to the last one's end, on this rank."""
        return seconds_between(*self.whole)

    @property
    def bubble(self) -> float:
        """Share of the time, 0 to 1, in which this rank computed nothing: it waited for its neighbours."""
        return max(0.0, 1.0 - self.compute_s / self.total_s)


class Pipeline:
    """This rank's stages, and the schedule by which they work with the other ranks' stages.

    Making one is a collective over `axis`, and so are its methods. `hidden` gives the shape and dtype of what passes
    between stages for one micro batch (a meta tensor will do); all micro batches have the same.

    Gradients are sums over the micro batches: nothing is divided by their number. FSDP2 reduces a stage's gradients once,
    after its last backward. `reshard` (FSDP2 with `reshard_after_forward`) frees a block's parameters after each of its
    backwards too; without it a stage keeps what it gathered until the schedule is through with it.

    `split_backward=False` computes input and weight gradients in one go under the schedules that would take them apart
    (`interleaved_zero_bubble`, `zbv`, `dualpipev`): for stages whose graph cannot be walked twice (compiled ones,
    recomputed or offloaded activations). Results are the same, idle time is not. It is so anyway where
    `SPLIT_BACKWARD_IS_SOUND` is false.

    Raises `ParallelError` where the schedule cannot work with these stages or this number of micro batches.
    """

    def __init__(
        self,
        parts: Sequence[StagePart],
        *,
        num_stages: int,
        axis: Axis,
        schedule: PipelineSchedule,
        num_micro_batches: int,
        hidden: Tensor,
        device: torch.device,
        split_backward: bool = True,
        reshard: bool = False,
    ) -> None:
        check_schedule(schedule, pp=axis.size, num_stages=num_stages, num_micro_batches=num_micro_batches)
        held = tuple(part.index for part in parts)
        expected = stages_of_rank(axis.rank, axis.size, num_stages, schedule)
        if held != expected:
            raise ParallelError(
                f'pipeline_schedule "{schedule}": rank {axis.rank} of {axis.size} was given the stages {list(held)} of '
                f"{num_stages}, and holds {list(expected)}"
            )
        self.num_stages = num_stages
        self.num_micro_batches = num_micro_batches
        self._axis = axis
        self._stopwatch = Stopwatch(device)
        self._stages = [
            Stage(
                part,
                num_stages=num_stages,
                axis=axis,
                hidden=hidden,
                device=device,
                stopwatch=self._stopwatch,
                split_backward=split_backward and SPLIT_BACKWARD_IS_SOUND,
                reshard=reshard,
            )
            for part in parts
        ]
        stages: Any = self._stages[0] if schedule in SINGLE_STAGE_SCHEDULES else self._stages
        self._schedule = _SCHEDULES[schedule](stages, num_micro_batches, loss_fn=_as_is, scale_grads=False)
        self._connect()

    def train(self, inputs: Sequence[Tensor], kwargs: Sequence[dict[str, Tensor]]) -> PipelineTimes:
        """Forward and backward of every micro batch of a step. Gradients add up in `.grad`.

        `inputs` are the first stage's, one for each micro batch; ranks that do not hold it may pass none. `kwargs` are for
        the stages on this rank. Every rank of the axis calls it. Raises `ParallelError` on another number of micro batches.
        """
        has_first = self._stages[0].is_first
        if len(kwargs) != self.num_micro_batches or (has_first and len(inputs) != self.num_micro_batches):
            raise ParallelError(
                f"a pipeline of {self.num_micro_batches} micro batches a step was given {len(inputs)} inputs and "
                f"{len(kwargs)} sets of arguments"
            )
        self._stopwatch.spans = []
        for stage in self._stages:
            stage.begin(inputs, kwargs)
        started = self._stopwatch.now()
        # Stages have their micro batches, so torch needs to cut none; it looks for a target beside every loss.
        self._schedule.step(target=torch.empty(self.num_micro_batches), return_outputs=False)
        ended = self._stopwatch.now()
        for stage in self._stages:
            stage.end()
        return PipelineTimes(spans=tuple(self._stopwatch.spans), whole=(started, ended))

    def evaluate(self, input: Tensor, kwargs: dict[str, Tensor]) -> None:
        """Forward of one micro batch through all stages, under the caller's grad mode; no backward can follow.

        The last stage's result is dropped: its `forward` keeps what it wants to. `input` is the first stage's. Every rank
        of the axis calls it, as often as the others; calls of different ranks overlap, as in a pipeline.
        """
        # Not by torch's schedule: that would set up all its buffers anew at every change between the two.
        x = input
        for stage in self._stages:
            here = stage.rank_of(stage.stage_index)
            if not stage.is_first and stage.rank_of(stage.stage_index - 1) != here:
                x = stage.empty_hidden()
                dist.recv(x, stage.rank_of(stage.stage_index - 1), group=self._axis.group)
            if not stage.is_first:
                x.requires_grad_(torch.is_grad_enabled())  # as in training, so that compiled blocks see the same
            x = stage.compute(x, kwargs).detach()
            if not stage.is_last and stage.rank_of(stage.stage_index + 1) != here:
                dist.send(x.contiguous(), stage.rank_of(stage.stage_index + 1), group=self._axis.group)

    def _connect(self) -> None:
        """Makes every connection once, one after the other: backends make them when first used, and both ends wait."""
        token = torch.zeros(1, device=self._stages[0].device)
        dist.all_reduce(token, group=self._axis.group)
        rank_of = self._stages[0].rank_of
        me = self._axis.ranks[self._axis.rank]
        for index in range(self.num_stages - 1):
            here, there = rank_of(index), rank_of(index + 1)
            if me == here != there:
                dist.send(token, there, group=self._axis.group)
            elif me == there != here:
                dist.recv(token, here, group=self._axis.group)


def check_schedule(schedule: PipelineSchedule, *, pp: int, num_stages: int, num_micro_batches: int) -> None:
    """Raises `ParallelError` where a schedule cannot run with so many ranks, stages and micro batches a step."""
    if schedule not in _SCHEDULES:
        raise ParallelError(f'pipeline_schedule "{schedule}" is unknown: use one of {", ".join(_SCHEDULES)}')
    if pp < 2:
        raise ParallelError(f"a pipeline needs 2 ranks or more, and this axis has {pp}: run the model as one part")
    name = f'pipeline_schedule "{schedule}"'
    if schedule in SINGLE_STAGE_SCHEDULES and num_stages != pp:
        raise ParallelError(f"{name} has one stage a rank: {num_stages} stages do not fit pp = {pp}; make {pp}")
    if schedule in V_SCHEDULES and num_stages != 2 * pp:
        raise ParallelError(f"{name} has two stages a rank: {num_stages} stages do not fit pp = {pp}; make {2 * pp}")
    if num_stages % pp:
        raise ParallelError(
            f"{name} has as many stages on every rank: {num_stages} is no multiple of pp = {pp}; "
            f"make {max(1, num_stages // pp) * pp} or {(num_stages // pp + 1) * pp}"
        )
    least = {"1f1b": pp, "dualpipev": num_stages}.get(schedule, 1)
    if num_micro_batches < least:
        raise ParallelError(
            f"{name} needs {least} or more micro batches a step with pp = {pp}, and there are {num_micro_batches}: "
            'make more (smaller ones, or a larger batch), or use "gpipe"'
        )
    rounds = max(1, num_micro_batches // pp)
    if schedule.startswith("interleaved") and num_micro_batches % rounds:
        down = num_micro_batches // pp * pp
        raise ParallelError(
            f"{name} goes in rounds: {num_micro_batches} micro batches cannot be dealt out with pp = {pp}; "
            f"use a multiple of pp, such as {down} or {down + pp}"
        )


def _as_is(output: Tensor, target: Tensor) -> Tensor:
    """The last stage has computed its loss already."""
    return output
