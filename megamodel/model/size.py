"""Parameters and floating-point operations of a decoder, counted on the real modules without memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamodel.model.config import ModelConfig
from megamodel.model.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Parameter counts: all, those that one token uses, and those of them that are matrices in a product."""

    total: int
    active: int
    active_matmul: int


def model_size(config: ModelConfig) -> ModelSize:
    """Counts on a decoder on the meta device; of routed experts, top_k of num_experts are active."""
    with torch.device("meta"):
        decoder = Decoder(config)
    share = config.moe.top_k / config.moe.num_experts if config.moe else 1.0
    total = active = active_matmul = 0
    for name, parameter in decoder.named_parameters():
        used = round(parameter.numel() * share) if ".experts." in name else parameter.numel()
        total += parameter.numel()
        active += used
        is_lookup_only = name == "embedding.weight" and not config.tie_embeddings
        if parameter.dim() > 1 and not is_lookup_only:
            active_matmul += used
    return ModelSize(total=total, active=active, active_matmul=active_matmul)


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward, as PaLM (Chowdhery et al. 2022, appendix B) counts: 6 per active matrix parameter, and
    6 * heads * (query width + value width) * seq_len per layer for attention, not halved for causality."""
    if config.mla:
        widths = config.mla.qk_nope_head_dim + config.mla.qk_rope_head_dim + config.mla.v_head_dim
    else:
        widths = 2 * config.head_dim
    attention = 6.0 * config.num_layers * config.num_heads * widths * seq_len
    return 6.0 * model_size(config).active_matmul + attention
