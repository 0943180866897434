"""Keys and values of the tokens seen so far, in memory taken once.

Shape suffixes: L layers, B batch, G key and value heads, C capacity, S new tokens, D width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megamodel.errors import ModelError
from megamodel.model.config import ModelConfig


class PreallocatedCache:
    """`KeyValueCache` of fixed capacity: no step copies what is already held.

    With latent attention it holds the expanded keys and values of every head, not the compressed latent.
    """

    def __init__(
        self, config: ModelConfig, *, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`capacity`: tokens of each sequence, those of the prompt included."""
        if config.mla is not None:
            heads = config.num_heads
            key_width, value_width = config.mla.qk_nope_head_dim + config.mla.qk_rope_head_dim, config.mla.v_head_dim
        else:
            heads, key_width, value_width = config.num_kv_heads, config.head_dim, config.head_dim
        shape = (config.num_layers, batch_size, heads, capacity)
        self._keys_LBGCD = torch.empty(*shape, key_width, dtype=dtype, device=device)
        self._values_LBGCD = torch.empty(*shape, value_width, dtype=dtype, device=device)
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens held before the current forward pass; it grows when the last layer has been given its share."""
        return self._length

    @property
    def capacity(self) -> int:
        """Most tokens that fit."""
        return self._keys_LBGCD.shape[3]

    def update(self, layer: int, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """Appends one layer's new keys and values; returns all of them, (B, G, length + S, D), as views.

        Raises ModelError when they do not fit.
        """
        end = self._length + k_BGSD.shape[2]
        if end > self.capacity:
            raise ModelError(f"the key-value cache holds {self.capacity} tokens and {end} are needed; make it larger")
        keys_BGCD, values_BGCD = self._keys_LBGCD[layer], self._values_LBGCD[layer]
        keys_BGCD[:, :, self._length : end] = k_BGSD
        values_BGCD[:, :, self._length : end] = v_BGSD
        if layer == self._keys_LBGCD.shape[0] - 1:
            self._length = end
        return keys_BGCD[:, :, :end], values_BGCD[:, :, :end]
