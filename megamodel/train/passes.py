"""Forward and backward of a step's micro batches: one after another through the whole model, or in flight through the
stages of a pipeline. The step knows no difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megamodel.model.decoder import Decoder, HiddenTerms, LossTerms
from megamodel.train.batch import TokenBatch, positions_of
from parallel.config import PipelineSchedule
from parallel.data_parallel import DataParallel
from parallel.pipeline import Pipeline, StagePart


class TermSums:
    """Sums of what forward passes on this rank gave; those of all ranks add up to the global batch's.

    `token_loss` counts on the ranks whose `Passes.speaks` is true only, since others may hold copies of the same.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self.token_loss = torch.zeros((), dtype=torch.float64, device=device)
        self.router_loss = torch.zeros((), dtype=torch.float64, device=device)
        self.entropy_L = torch.zeros(num_layers, dtype=torch.float64, device=device)
        self.counts_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, terms: LossTerms | HiddenTerms, part: Decoder) -> None:
        """Adds one forward pass of one part of the model."""
        if isinstance(terms, LossTerms):
            self.token_loss += terms.token_loss_sum
        self.router_loss += terms.router_loss_sum
        for (index, _), stats in zip(part.moe_layers(), terms.router_stats, strict=True):
            self.entropy_L[index] += stats.entropy_sum
            self.counts_LE[index] += stats.counts_E


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """What the micro batches of a step gave on this rank. `bubble`: share of the time in which this rank's pipeline
    stages had nothing to compute (None without a pipeline)."""

    sums: TermSums
    bubble: float | None


class Passes(Protocol):
    """How this rank takes part in forward and backward."""

    speaks: bool
    """Exactly one of the ranks that see the same tokens says so: it counts them, and their loss, for all."""

    def train(self, micro_batches: Sequence[TokenBatch], divisor: int) -> PassResult:
        """Leaves in the parameters the gradient of the summed loss over `divisor`, summed over ranks."""
        ...

    def evaluate(self, batch: TokenBatch, *, with_graph: bool) -> TermSums:
        """The forward alone; `with_graph` leaves gradients enabled, though no backward follows."""
        ...


def new_sums(part: Decoder, data_parallel: DataParallel) -> TermSums:
    """Zeros for a model of which `part` is a part, on the device that computes (parameters may lie elsewhere)."""
    config = part.config
    device = data_parallel.mesh.world.device
    return TermSums(config.num_moe_layers, config.moe.num_experts if config.moe else 0, device)


class WholeModelPasses:
    """`Passes` of a rank through which every layer runs."""

    def __init__(self, data_parallel: DataParallel) -> None:
        self._data_parallel = data_parallel
        (part,) = data_parallel.parts
        assert isinstance(part, Decoder)
        self._decoder = part
        self.speaks = data_parallel.mesh.coordinate("tp") == 0

    def train(self, micro_batches: Sequence[TokenBatch], divisor: int) -> PassResult:
        """See `Passes`."""
        sums = new_sums(self._decoder, self._data_parallel)
        for index, batch in enumerate(micro_batches):
            with self._data_parallel.micro_step(is_last=index == len(micro_batches) - 1):
                terms: LossTerms = self._data_parallel.module(batch.tokens_BS, **_keywords(batch))
                self._data_parallel.backward((terms.token_loss_sum + terms.router_loss_sum) / divisor)
            sums.add(terms, self._decoder)
            del terms  # or this batch's activations would live through the next one's forward
        return PassResult(sums=sums, bubble=None)

    def evaluate(self, batch: TokenBatch, *, with_graph: bool) -> TermSums:
        """See `Passes`. No gradient is reduced, since the model is called without its engine's wrapper."""
        sums = new_sums(self._decoder, self._data_parallel)
        with torch.set_grad_enabled(with_graph):
            sums.add(self._decoder(batch.tokens_BS, **_keywords(batch)), self._decoder)
        return sums


class PipelinePasses:
    """`Passes` of a rank that holds one or more stages of a pipeline."""

    def __init__(
        self,
        data_parallel: DataParallel,
        *,
        stages: Sequence[int],
        num_stages: int,
        schedule: PipelineSchedule,
        num_micro_batches: int,
        micro_batch_size: int,
        seq_len: int,
        split_backward: bool,
        reshard: bool,
    ) -> None:
        """See `Pipeline`."""
        mesh = data_parallel.mesh
        self._data_parallel = data_parallel
        self._parts = [part for part in data_parallel.parts if isinstance(part, Decoder)]
        self.speaks = mesh.coordinate("tp") == 0 and any(part.is_last for part in self._parts)
        self._divisor = 1
        self._sums: TermSums = new_sums(self._parts[0], self._data_parallel)
        first = self._parts[0]
        hidden = torch.empty(
            micro_batch_size,
            seq_len // mesh.size("cp", "tp"),
            first.config.d_model,
            dtype=first.compute_dtype,
            device="meta",
        )
        self._pipeline = Pipeline(
            [
                StagePart(index=stage, module=part, forward=_StageForward(self, part))
                for stage, part in zip(stages, self._parts, strict=True)
            ],
            num_stages=num_stages,
            axis=mesh.axis("pp"),
            schedule=schedule,
            num_micro_batches=num_micro_batches,
            hidden=hidden,
            device=mesh.world.device,
            split_backward=split_backward,
            reshard=reshard,
        )

    def train(self, micro_batches: Sequence[TokenBatch], divisor: int) -> PassResult:
        """See `Passes`."""
        self._divisor = divisor
        self._sums = new_sums(self._parts[0], self._data_parallel)
        with self._data_parallel.micro_step(is_last=True):
            times = self._pipeline.train(
                [batch.tokens_BS for batch in micro_batches], [_stage_keywords(batch) for batch in micro_batches]
            )
        return PassResult(sums=self._sums, bubble=times.bubble)

    def evaluate(self, batch: TokenBatch, *, with_graph: bool) -> TermSums:
        """See `Passes`."""
        self._sums = new_sums(self._parts[0], self._data_parallel)
        with torch.set_grad_enabled(with_graph):
            self._pipeline.evaluate(batch.tokens_BS, _stage_keywords(batch))
        return self._sums

    def stage_forward(self, part: Decoder, inputs: Tensor, keywords: dict[str, Any]) -> Tensor:
        """One micro batch through one stage: hidden states, or the loss over the step's divisor."""
        terms: LossTerms | HiddenTerms = part(inputs, **keywords)
        self._sums.add(terms, part)
        router_loss = terms.router_loss_sum / self._divisor
        if isinstance(terms, LossTerms):
            return terms.token_loss_sum / self._divisor + router_loss
        if not router_loss.requires_grad:
            return terms.x_BSD
        x_BSD: Tensor = _WithLoss.apply(terms.x_BSD, router_loss)
        return x_BSD


@dataclass(frozen=True)
class _StageForward:
    passes: PipelinePasses
    part: Decoder

    def __call__(self, inputs: Tensor, **keywords: Any) -> Tensor:
        return self.passes.stage_forward(self.part, inputs, keywords)


class _WithLoss(torch.autograd.Function):
    """Hidden states as they are; in the backward the loss gets its gradient (one) where theirs passes by. So a loss that
    arises in the middle of a pipeline need not travel to its end."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_dtype = loss.dtype
        return x_BSD.clone()  # no view: schedules that split the backward detach a stage's result in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones((), dtype=ctx.loss_dtype, device=grads[0].device)


def _keywords(batch: TokenBatch) -> dict[str, Tensor | None]:
    return {
        "labels_BS": batch.labels_BS,
        "document_ids_BS": batch.document_ids_BS,
        "positions_S": batch.positions_S,
        "row_weight_B": batch.row_weight_B,
    }


def _stage_keywords(batch: TokenBatch) -> dict[str, Any]:
    return {**_keywords(batch), "positions_S": positions_of(batch)}
