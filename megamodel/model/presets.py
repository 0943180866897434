"""Named shapes: small ones that train on a laptop, and published ones as their authors give them. Imports without torch."""

from __future__ import annotations

from typing import Any

_LLAMA_3 = {
    "vocab_size": 128_256,
    "max_seq_len": 8192,
    "num_kv_heads": 8,
    "head_dim": 128,
    "rope_theta": 500_000.0,
    "norm_eps": 1e-5,
}

PRESETS: dict[str, dict[str, Any]] = {
    # Small ones of our own.
    "moe-tiny": {
        "vocab_size": 512,
        "max_seq_len": 128,
        "num_layers": 2,
        "d_model": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "d_ff": 128,
        "qk_norm": True,
        "norm_eps": 1e-6,
        "tie_embeddings": True,
        "moe": {"num_experts": 4, "top_k": 2, "d_ff": 64},
    },
    "dense-7m": {
        "vocab_size": 4096,
        "max_seq_len": 1024,
        "num_layers": 6,
        "d_model": 256,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "d_ff": 1024,
        "qk_norm": True,
        "norm_eps": 1e-6,
        "tie_embeddings": True,
    },
    "moe-7m": {
        "vocab_size": 4096,
        "max_seq_len": 1024,
        "num_layers": 3,
        "d_model": 256,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "d_ff": 768,
        "qk_norm": True,
        "norm_eps": 1e-6,
        "tie_embeddings": True,
        "moe": {"num_experts": 8, "top_k": 2, "d_ff": 288},
    },
    # Llama 3 (Grattafiori et al. 2024, table 3).
    "llama3-8b": {**_LLAMA_3, "num_layers": 32, "d_model": 4096, "num_heads": 32, "d_ff": 14_336},
    "llama3-70b": {**_LLAMA_3, "num_layers": 80, "d_model": 8192, "num_heads": 64, "d_ff": 28_672},
    "llama3-405b": {**_LLAMA_3, "num_layers": 126, "d_model": 16_384, "num_heads": 128, "d_ff": 53_248},
    # Mixtral of experts (Jiang et al. 2024, table 1).
    "mixtral-8x7b": {
        "vocab_size": 32_000,
        "max_seq_len": 32_768,
        "num_layers": 32,
        "d_model": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "d_ff": 14_336,
        "rope_theta": 1_000_000.0,
        "moe": {"num_experts": 8, "top_k": 2, "d_ff": 14_336, "aux_loss_weight": 0.02},
    },
    # Qwen3 technical report (2025, table 2) and its published configuration.
    "qwen3-30b-a3b": {
        "vocab_size": 151_936,
        "max_seq_len": 40_960,
        "num_layers": 48,
        "d_model": 2048,
        "num_heads": 32,
        "num_kv_heads": 4,
        "head_dim": 128,
        "d_ff": 6144,
        "qk_norm": True,
        "rope_theta": 1_000_000.0,
        "norm_eps": 1e-6,
        "moe": {"num_experts": 128, "top_k": 8, "d_ff": 768, "aux_loss_weight": 0.001},
    },
    # DeepSeek-V3 technical report (2024, section 4.2); without its multi-token prediction module and group-limited routing.
    "deepseek-v3": {
        "vocab_size": 129_280,
        "max_seq_len": 4096,
        "num_layers": 61,
        "d_model": 7168,
        "num_heads": 128,
        "num_kv_heads": 128,
        "head_dim": 128,
        "d_ff": 18_432,
        "norm_eps": 1e-6,
        "init_std": 0.006,
        "moe": {
            "num_experts": 256,
            "top_k": 8,
            "d_ff": 2048,
            "num_shared_experts": 1,
            "router_score": "sigmoid",
            "gate_scale": 2.5,
            "balance": "bias",
            "first_layer": 3,
        },
        "mla": {
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
    },
}
