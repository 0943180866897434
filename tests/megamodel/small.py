"""Small decoders for tests. Initial weights are larger than in training, so that attention and routing have a say."""

from __future__ import annotations

from typing import Any

import torch

from megamodel.model.config import ModelConfig
from megamodel.model.decoder import Decoder, Seams
from megamodel.model.initialization import initialize

MOE = {"num_experts": 4, "top_k": 2, "d_ff": 24}
MLA = {
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}


def small_config(**fields: Any) -> ModelConfig:
    """Two layers of width 32; `fields` replace any of it."""
    defaults = {
        "vocab_size": 97,
        "max_seq_len": 64,
        "num_layers": 2,
        "d_model": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "d_ff": 48,
        "init_std": 0.2,
    }
    return ModelConfig(**{**defaults, **fields})


def build(config: ModelConfig, seed: int = 0, seams: Seams | None = None) -> Decoder:
    """Built on meta, then materialised and initialised, as training does."""
    with torch.device("meta"):
        decoder = Decoder(config, seams)
    decoder.to_empty(device="cpu")
    initialize(decoder, config, seed)
    return decoder


def random_tokens(config: ModelConfig, batch: int, seq: int, seed: int = 0) -> torch.Tensor:
    """(batch, seq) ids."""
    return torch.randint(0, config.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))
