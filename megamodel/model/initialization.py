"""Initial weights that depend on the seed and a tensor's name alone: never on layout, order or device."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megamodel.model.config import ModelConfig

# Projections back into the residual stream: their sum over layers would grow with depth (GPT-2, section 2.3).
_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "w_down_EFD")
_BLOCK_ELEMENTS = 2**22


def initial_value(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """The whole tensor called `name`, float32 on the CPU, whoever asks."""
    return initial_part(name, shape, [0] * len(shape), shape, config, seed)


def initial_part(
    name: str, shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int], config: ModelConfig, seed: int
) -> Tensor:
    """The box of `sizes` at `offsets` of the whole tensor of `shape`, without making all of the whole.

    Each matrix of a stack, and each block of rows of a large matrix, has random numbers of its own.
    """
    if name.endswith("norm.weight"):
        return torch.ones(*sizes)
    if name.endswith("balance_bias"):
        return torch.zeros(*sizes)
    std = config.init_std
    if name.endswith(_RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * config.num_layers)
    part = torch.empty(*sizes)
    matrices = part[None] if part.dim() == 2 else part
    first_matrix = 0 if part.dim() == 2 else offsets[0]
    for index, matrix in enumerate(matrices):
        _fill(matrix, f"{seed}/{name}/{first_matrix + index}", shape[-2:], offsets[-2:], std)
    return part


def _fill(part: Tensor, key: str, shape: Sequence[int], offsets: Sequence[int], std: float) -> None:
    """One matrix: the blocks of rows that the part touches."""
    rows, columns = shape
    height = max(1, _BLOCK_ELEMENTS // columns)
    begin, end = offsets[0], offsets[0] + part.shape[0]
    for block in range(begin // height, -(-end // height)):
        top, bottom = block * height, min(rows, (block + 1) * height)
        digest = hashlib.blake2b(f"{key}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        values = torch.empty(bottom - top, columns).normal_(0.0, std, generator=generator)
        low, high = max(begin, top), min(end, bottom)
        part[low - begin : high - begin] = values[low - top : high - top, offsets[1] : offsets[1] + part.shape[1]]


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fills a materialised, unsharded decoder in place."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.copy_(initial_value(name, tensor.shape, config, seed))
