"""The one training step: forward and backward of each micro batch, clip, update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megamodel.model.decoder import Decoder, LossTerms
from megamodel.train.optimizer import Optimizers
from parallel.data_parallel import DataParallel
from parallel.world import World


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Some samples on the device: ids, labels (negative: none), and document ids (None: one document a row)."""

    tokens_BS: Tensor
    labels_BS: Tensor
    document_ids_BS: Tensor | None


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
    compute_s: float
    """Seconds in forward, backward and the reduction of gradients."""
    update_s: float
    """Seconds in clipping and the optimizers."""


class TrainStep:
    """Holds what a step needs and does one at a time. Calling it is a collective over all ranks."""

    def __init__(
        self, *, world: World, decoder: Decoder, data_parallel: DataParallel, optimizers: Optimizers, max_norm: float
    ) -> None:
        self.world = world
        self.decoder = decoder
        self.data_parallel = data_parallel
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
        outputs = []
        for index, batch in enumerate(micro_batches):
            with self.data_parallel.micro_step(is_last=index == len(micro_batches) - 1):
                terms: LossTerms = self.data_parallel.module(batch.tokens_BS, batch.labels_BS, batch.document_ids_BS)
                ((terms.token_loss_sum + terms.router_loss_sum) / max(1, num_valid)).backward()
            outputs.append(LossTerms(terms.token_loss_sum.detach(), terms.router_loss_sum.detach(), terms.router_stats))
        grad_norm = self.data_parallel.clip_grad_norm(self.max_norm)
        sums = self._reduce(outputs, grad_norm, stop_requested())
        computed = time.perf_counter()
        skipped = not (math.isfinite(sums.grad_norm) and math.isfinite(sums.token_loss))
        if not skipped:
            self.optimizers.step(lr_factor)
            if sums.counts_LE is not None:
                self.decoder.update_balance_bias(sums.counts_LE.to(self.world.device))
        self.optimizers.zero_grad()
        router = None
        if sums.counts_LE is not None and sums.entropy_L is not None:
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
            compute_s=computed - started,
            update_s=time.perf_counter() - computed,
        )

    def _global_counts(self, micro_batches: Sequence[TokenBatch]) -> tuple[int, int]:
        """Tokens with a label, and all tokens, of the global batch."""
        counts = torch.zeros(2, dtype=torch.int64, device=self.world.device)
        for batch in micro_batches:
            counts[0] += (batch.labels_BS >= 0).sum()
            counts[1] += batch.labels_BS.numel()
        valid, total = self.world.all_reduce_sum(counts).tolist()
        return valid, total

    def _reduce(self, outputs: list[LossTerms], grad_norm: Tensor, stop_requested: bool) -> _StepSums:
        """All figures of the step in one all-reduce, and one wait for the device."""
        layers = len(outputs[0].router_stats)
        scalars = torch.stack(
            [
                torch.stack([o.token_loss_sum for o in outputs]).sum(),
                torch.stack([o.router_loss_sum for o in outputs]).sum(),
                torch.tensor(float(stop_requested), device=self.world.device),
            ]
        ).double()
        pieces = [scalars]
        for layer in range(layers):
            pieces.append(torch.stack([o.router_stats[layer].entropy_sum for o in outputs]).sum().double()[None])
            pieces.append(torch.stack([o.router_stats[layer].counts_E for o in outputs]).sum(dim=0).double())
        packed = self.world.all_reduce_sum(torch.cat(pieces))
        # The norm is global already; it rides along so that the host waits for the device once.
        packed = torch.cat([grad_norm.double().reshape(1).to(packed.device), packed]).cpu()
        by_layer = packed[4:].view(layers, -1) if layers else None
        return _StepSums(
            grad_norm=float(packed[0]),
            token_loss=float(packed[1]),
            router_loss=float(packed[2]),
            stop_requested=bool(packed[3] > 0),
            entropy_L=None if by_layer is None else by_layer[:, 0],
            counts_LE=None if by_layer is None else by_layer[:, 1:].long(),
        )


@dataclass(frozen=True, kw_only=True)
class _StepSums:
    grad_norm: float
    token_loss: float
    router_loss: float
    stop_requested: bool
    entropy_L: Tensor | None
    counts_LE: Tensor | None
