"""Grouped-query attention (Ainslie et al. 2023) and multi-head latent attention (DeepSeek-V2, section 2.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megamodel.model.config import MLAConfig, ModelConfig
from megamodel.model.layers import Linear, RMSNorm
from megamodel.model.rope import rotate
from megamodel.model.seams import AttentionCore, KeyValueCache


class GroupedQueryAttention(nn.Module):
    """Multi-head attention whose query heads share fewer key and value heads."""

    def __init__(self, config: ModelConfig, core: AttentionCore) -> None:
        super().__init__()
        self.core = core
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.d_model, config.num_heads * config.head_dim)
        self.k_proj = Linear(config.d_model, config.num_kv_heads * config.head_dim)
        self.v_proj = Linear(config.d_model, config.num_kv_heads * config.head_dim)
        self.o_proj = Linear(config.num_heads * config.head_dim, config.d_model)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self, x_BSD: Tensor, rotary: Tensor, prepared: Any, cache: KeyValueCache | None = None, layer: int = 0
    ) -> Tensor:
        """(B, S, d_model) -> (B, S, d_model). `rotary` is `rotary_table` of these positions; `prepared` the core's own."""
        batch, seq, _ = x_BSD.shape
        q_BSHD = self.q_proj(x_BSD).view(batch, seq, -1, self.head_dim)
        k_BSGD = self.k_proj(x_BSD).view(batch, seq, -1, self.head_dim)
        v_BGSD = self.v_proj(x_BSD).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHD, k_BSGD = self.q_norm(q_BSHD), self.k_norm(k_BSGD)
        q_BHSD = rotate(q_BSHD.transpose(1, 2), rotary)
        k_BGSD = rotate(k_BSGD.transpose(1, 2), rotary)
        if cache is not None:
            k_BGSD, v_BGSD = cache.update(layer, k_BGSD, v_BGSD)
        out_BHSD = self.core(q_BHSD, k_BGSD, v_BGSD, prepared)
        return self.o_proj(out_BHSD.transpose(1, 2).reshape(batch, seq, -1))


class MultiHeadLatentAttention(nn.Module):
    """Queries, keys and values through low-rank bottlenecks; the rotary part of the key is shared by all heads."""

    def __init__(self, config: ModelConfig, mla: MLAConfig, core: AttentionCore) -> None:
        super().__init__()
        self.core = core
        self.mla = mla
        heads = config.num_heads
        self.q_down = Linear(config.d_model, mla.q_lora_rank)
        self.q_latent_norm = RMSNorm(mla.q_lora_rank, config.norm_eps)
        self.q_up = Linear(mla.q_lora_rank, heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim))
        self.kv_down = Linear(config.d_model, mla.kv_lora_rank + mla.qk_rope_head_dim)
        self.kv_latent_norm = RMSNorm(mla.kv_lora_rank, config.norm_eps)
        self.kv_up = Linear(mla.kv_lora_rank, heads * (mla.qk_nope_head_dim + mla.v_head_dim))
        self.o_proj = Linear(heads * mla.v_head_dim, config.d_model)

    def forward(
        self, x_BSD: Tensor, rotary: Tensor, prepared: Any, cache: KeyValueCache | None = None, layer: int = 0
    ) -> Tensor:
        """(B, S, d_model) -> (B, S, d_model); arguments as for grouped-query attention."""
        batch, seq, _ = x_BSD.shape
        nope, rope = self.mla.qk_nope_head_dim, self.mla.qk_rope_head_dim
        q_BHSD = self.q_up(self.q_latent_norm(self.q_down(x_BSD))).view(batch, seq, -1, nope + rope).transpose(1, 2)
        q_nope, q_rope = q_BHSD.split((nope, rope), dim=-1)
        latent, k_rope = self.kv_down(x_BSD).split((self.mla.kv_lora_rank, rope), dim=-1)
        kv_BSHD = self.kv_up(self.kv_latent_norm(latent)).view(batch, seq, -1, nope + self.mla.v_head_dim)
        k_nope, v_BHSD = kv_BSHD.transpose(1, 2).split((nope, self.mla.v_head_dim), dim=-1)
        k_rope = rotate(k_rope[:, None], rotary).expand(-1, q_BHSD.shape[1], -1, -1)
        q_BHSD = torch.cat((q_nope, rotate(q_rope, rotary)), dim=-1)
        k_BHSD = torch.cat((k_nope, k_rope), dim=-1)
        if cache is not None:
            k_BHSD, v_BHSD = cache.update(layer, k_BHSD, v_BHSD)
        out_BHSD = self.core(q_BHSD, k_BHSD, v_BHSD, prepared)
        return self.o_proj(out_BHSD.transpose(1, 2).reshape(batch, seq, -1))
