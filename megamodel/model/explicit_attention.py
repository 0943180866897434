"""Attention that makes the matrix of scores: quadratic memory, and on CPUs the fastest way for short rows.

Shape suffixes: B batch, S queries, K keys, H query heads, G key and value heads, D width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ExplicitScores:
    """`AttentionCore` by two matrix products and a float32 softmax. Meant to be compiled.

    Query heads that share a key head are one taller matrix, so nothing is repeated.
    """

    def prepare(self, document_ids_BS: Tensor | None, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        """A (B or 1, 1, 1, S, K) mask, true = visible."""
        offset = num_keys - num_queries
        mask_SK = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(offset)
        if document_ids_BS is None:
            return mask_SK[None, None, None]
        same_BSK = document_ids_BS[:, offset:, None] == document_ids_BS[:, None, :]
        return (same_BSK & mask_SK)[:, None, None]

    def __call__(self, q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, prepared: Tensor) -> Tensor:
        """See `AttentionCore`."""
        batch, heads, seq, width = q_BHSD.shape
        groups, keys = k_BGSD.shape[1], k_BGSD.shape[2]
        rows = heads // groups * seq
        scores = q_BHSD.reshape(batch, groups, rows, width) @ k_BGSD.transpose(-1, -2)
        scores = scores.view(batch, groups, heads // groups, seq, keys).float() * width**-0.5
        weights = scores.masked_fill(~prepared, float("-inf")).softmax(dim=-1).to(v_BGSD.dtype)
        return (weights.view(batch, groups, rows, keys) @ v_BGSD).view(batch, heads, seq, -1)
