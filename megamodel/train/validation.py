"""Loss and bits per byte on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megamodel.train.batch import TokenBatch
from megamodel.train.passes import Passes
from parallel.world import World


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """Over all held-out tokens that were asked for; the same on every rank."""

    loss: float
    """Cross-entropy in nats per token."""
    bits_per_byte: float
    """The same in bits per byte of text: comparable across tokenizers, and with compressors."""
    num_tokens: int
    num_bytes: int


def validate(
    passes: Passes,
    batches: Iterable[TokenBatch],
    *,
    world: World,
    bytes_of_token_V: Tensor,
    reuse_training_graph: bool,
) -> ValidationResult:
    """Runs the model on this rank's batches and sums over ranks. A collective: each rank needs as many batches.

    `reuse_training_graph` leaves gradients enabled, though no backward follows: without them torch.compile builds every
    block once more, which on a CPU takes longer than it saves.
    bytes_of_token_V: UTF-8 bytes that each id stands for, 0 for special tokens.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    for batch in batches:
        found = passes.evaluate(batch, with_graph=reuse_training_graph)
        if not passes.speaks:
            continue
        labels = batch.labels_BS[batch.labels_BS >= 0]
        sums[0] += found.token_loss
        sums[1] += labels.numel()
        sums[2] += bytes_of_token_V[labels].sum()
    nats, tokens, num_bytes = world.all_reduce_sum(sums).tolist()
    return ValidationResult(
        loss=nats / max(1.0, tokens),
        bits_per_byte=nats / math.log(2) / max(1.0, num_bytes),
        num_tokens=int(tokens),
        num_bytes=int(num_bytes),
    )
