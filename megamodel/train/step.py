"""The one training step: forward and backward of each micro batch, clip, update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megamodel.train.batch import TokenBatch
from megamodel.train.build import BuiltModel
from megamodel.train.optimizer import Optimizers
from megamodel.train.passes import PassResult


@dataclass(frozen=True, kw_only=True)
class RouterReport:
    """All routers over one global batch."""

    counts_LE: Tensor
    """Rows each expert of each MoE layer got (int64, CPU)."""
    entropy_L: Tensor
    """Mean entropy of the routing distribution, in nats a token."""
    loss: float
    """Weighted balance and z-losses, per valid token."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step over the global batch; the same on every rank."""

    loss: float
    """Cross-entropy in nats per valid token."""
    grad_norm: float
    """Global 2-norm of the gradient before clipping."""
    skipped: bool
    """The gradient was NaN or infinite: nothing was updated."""
    stop_requested: bool
    """Some rank was asked to stop."""
    num_valid_tokens: int
    num_tokens: int
    router: RouterReport | None
    pipeline_bubble: float | None
    """Share of forward and backward in which a rank had nothing to compute, mean over ranks; None without a pipeline."""
    compute_s: float
    """Seconds in forward, backward and the reduction of gradients."""
    update_s: float
    """Seconds in clipping and the optimizers."""


class Step(Protocol):
    """One optimizer step over the global batch: a collective over all ranks."""

    def __call__(
        self, micro_batches: Sequence[TokenBatch], *, lr_factor: float, stop_requested: Callable[[], bool]
    ) -> StepResult:
        """See `TrainStep`."""
        ...


class TrainStep:
    """Holds what a step needs and does one at a time. Calling it is a collective over all ranks."""

    def __init__(self, built: BuiltModel, optimizers: Optimizers, *, max_norm: float) -> None:
        self.world = built.mesh.world
        self.built = built
        self.passes = built.passes
        self.optimizers = optimizers
        self.max_norm = max_norm

    def __call__(
        self, micro_batches: Sequence[TokenBatch], *, lr_factor: float, stop_requested: Callable[[], bool]
    ) -> StepResult:
        """One update at `lr_factor` times the peak learning rates; skipped on all ranks if the gradient is not finite.

        `stop_requested` is asked late in the step, and its answer is that of any rank.
        """
        started = time.perf_counter()
        num_valid, num_tokens = self._global_counts(micro_batches)
        passed = self.passes.train(micro_batches, max(1, num_valid))
        grad_norm = self.built.data_parallel.clip_grad_norm(self.max_norm)
        sums = self._reduce(passed, grad_norm, stop_requested())
        computed = time.perf_counter()
        skipped = not (math.isfinite(sums.grad_norm) and math.isfinite(sums.token_loss))
        if not skipped:
            self.optimizers.step(lr_factor)
            self.built.after_update(None if sums.counts_LE is None else sums.counts_LE.to(self.world.device))
        else:
            self.optimizers.discard()
        router = None
        if sums.counts_LE is not None:
            router = RouterReport(
                counts_LE=sums.counts_LE,
                entropy_L=sums.entropy_L / num_tokens,
                loss=sums.router_loss / max(1, num_valid),
            )
        return StepResult(
            loss=sums.token_loss / max(1, num_valid),
            grad_norm=sums.grad_norm,
            skipped=skipped,
            stop_requested=sums.stop_requested,
            num_valid_tokens=num_valid,
            num_tokens=num_tokens,
            router=router,
            pipeline_bubble=sums.bubble,
            compute_s=computed - started,
            update_s=time.perf_counter() - computed,
        )

    def _global_counts(self, micro_batches: Sequence[TokenBatch]) -> tuple[int, int]:
        """Tokens with a label, and all tokens, of the global batch."""
        counts = torch.zeros(2, dtype=torch.int64, device=self.world.device)
        for batch in micro_batches if self.passes.speaks else ():
            counts[0] += (batch.labels_BS >= 0).sum()
            counts[1] += batch.labels_BS.numel()
        valid, total = self.world.all_reduce_sum(counts).tolist()
        return valid, total

    def _reduce(self, passed: PassResult, grad_norm: Tensor, stop_requested: bool) -> _StepSums:
        """All figures of the step in one all-reduce, and one wait for the device."""
        sums = passed.sums
        here = torch.tensor(
            [float(stop_requested), (passed.bubble or 0.0) / self.world.world_size],
            dtype=torch.float64,
            device=self.world.device,
        )
        token_loss = sums.token_loss if self.passes.speaks else torch.zeros_like(sums.token_loss)
        packed = self.world.all_reduce_sum(
            torch.cat(
                [token_loss[None], sums.router_loss[None], here, sums.entropy_L, sums.counts_LE.double().flatten()]
            )
        )
        # The norm is global already; it rides along so that the host waits for the device once.
        packed = torch.cat([grad_norm.double().reshape(1).to(packed.device), packed]).cpu()
        num_layers, num_experts = sums.counts_LE.shape
        entropy_L, counts = packed[5:].split([num_layers, num_layers * num_experts])
        return _StepSums(
            grad_norm=float(packed[0]),
            token_loss=float(packed[1]),
            router_loss=float(packed[2]),
            stop_requested=bool(packed[3] > 0),
            bubble=None if passed.bubble is None else float(packed[4]),
            entropy_L=entropy_L,
            counts_LE=counts.view(num_layers, num_experts).long() if num_layers else None,
        )


@dataclass(frozen=True, kw_only=True)
class _StepSums:
    grad_norm: float
    token_loss: float
    router_loss: float
    stop_requested: bool
    bubble: float | None
    entropy_L: Tensor
    counts_LE: Tensor | None
