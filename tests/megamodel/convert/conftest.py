"""Checkpoints that transformers itself wrote, of every family, with weights large enough to tell a mistake."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.requirements import require

_COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# name -> (prefix of transformers' classes, fields)
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _COMMON),
    "llama_tied_other_theta": (
        "Llama",
        {**_COMMON, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "qwen3": ("Qwen3", {**_COMMON, "head_dim": 12}),
    "qwen3_tied": ("Qwen3", {**_COMMON, "head_dim": 8, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "qwen3_moe": ("Qwen3Moe", {**_COMMON, **_EXPERTS, "norm_topk_prob": True}),
    "qwen3_moe_some_dense": (
        "Qwen3Moe",
        {**_COMMON, **_EXPERTS, "norm_topk_prob": False, "mlp_only_layers": [0], "head_dim": 16},
    ),
    "qwen3_moe_every_other": ("Qwen3Moe", {**_COMMON, **_EXPERTS, "num_hidden_layers": 4, "decoder_sparse_step": 2}),
    "mixtral": ("Mixtral", {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


def write_checkpoint(name: str, folder: Path) -> Any:
    """Writes the checkpoint into `folder`; returns transformers' model."""
    require("transformers")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    prefix, fields = CHECKPOINTS[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**fields))
    for key, parameter in model.named_parameters():
        if "norm" in key:  # ones would hide a norm that is left out or swapped
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.eval().save_pretrained(folder)
    return model


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("conversion must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
