"""Initial weights that depend on the seed and a tensor's name alone: never on layout, order or device."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from megamodel.model.config import ModelConfig

# Projections back into the residual stream: their sum over layers would grow with depth (GPT-2, section 2.3).
_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "w_down_EFD")


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The whole tensor called `name`, float32 on the CPU, whoever asks."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith("balance_bias"):
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    std = config.init_std
    if name.endswith(_RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * config.num_layers)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fills a materialised, unsharded decoder in place."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.copy_(initial_value(name, tensor.shape, config, seed))
