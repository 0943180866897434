"""config.json as published checkpoints have it, against the presets."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megamodel.convert.families import FAMILIES
from megamodel.convert.hf_config import export_problems, family_for, read_hf_config, tensor_specs, to_hf_config
from megamodel.model.config import ModelConfig
from megamodel.model.size import model_size
from tests.megamodel.small import MLA, MOE, small_config

_COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    },
    "mixtral-8x7b": {
        **_COMMON,
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "vocab_size": 32000,
    },
    "qwen3-30b-a3b": {
        **_COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
# Entries of the published model.safetensors.index.json.
NUM_TENSORS = {"llama3-8b": 291, "mixtral-8x7b": 995, "qwen3-30b-a3b": 18867}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_config_is_the_preset(preset: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[preset]))
    family, config = read_hf_config(tmp_path)
    expected = ModelConfig(preset=preset).model_dump(exclude={"preset"})
    assert config.model_dump(exclude={"preset"}) == expected
    assert family is family_for(config)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_written_config_says_what_the_published_one_says(preset: str) -> None:
    config = ModelConfig(preset=preset)
    written = to_hf_config(config, family_for(config), "bfloat16")
    ours_alone = {"bos_token_id", "eos_token_id", "torch_dtype", "transformers_version", "rope_scaling"}
    for key in set(PUBLISHED[preset]) - ours_alone - {"attention_dropout", "max_window_layers", "output_router_logits"}:
        if key != "sliding_window" or preset == "mixtral-8x7b":
            assert written[key] == PUBLISHED[preset][key], key


@pytest.mark.parametrize("preset", PUBLISHED)
def test_tables_cover_every_parameter_once(preset: str) -> None:
    config = ModelConfig(preset=preset)
    specs = list(tensor_specs(family_for(config), config))
    assert len(specs) == len({spec.theirs for spec in specs}) == NUM_TENSORS[preset]
    assert sum(math.prod(spec.shape) for spec in specs) == model_size(config).total


def test_one_family_a_model_type() -> None:
    assert sorted(FAMILIES) == ["llama", "mixtral", "qwen3", "qwen3_moe"]
    assert all(family.model_type == name for name, family in FAMILIES.items())


def test_what_keeps_a_model_from_being_exported_is_known_before_it_is_trained() -> None:
    assert export_problems(small_config(moe=MOE)) == []
    assert export_problems(small_config(mla=MLA)) == ["model.mla (latent attention)"]
    biased = small_config(moe={**MOE, "balance": "bias", "router_score": "sigmoid", "num_shared_experts": 1})
    assert [problem.split(" ")[0] for problem in export_problems(biased)] == [
        "model.moe.router_score",
        "model.moe.num_shared_experts",
        "model.moe.balance",
    ]
