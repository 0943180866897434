"""Rotary position embedding (Su et al. 2021), in the half-split layout that Hugging Face checkpoints use."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(positions_S: Tensor, dim: int, theta: float) -> Tensor:
    """Angles' cosines and sines for each position: (2, S, dim / 2), float32."""
    frequencies = theta ** (-torch.arange(0, dim, 2, device=positions_S.device, dtype=torch.float32) / dim)
    angles = torch.outer(positions_S.float(), frequencies)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x_BHSD: Tensor, table: Tensor) -> Tensor:
    """Rotates each pair (x[i], x[i + dim / 2]) of the last dim by its position's angle; dtype is kept."""
    cos, sin = table[0], table[1]
    first, second = x_BHSD.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BHSD.dtype)
