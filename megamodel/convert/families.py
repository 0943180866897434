"""Hugging Face's decoder families as data: which tensor is called what and has which shape, and which key of config.json
means which field. One table a family; nothing here computes.

A dim of a shape is the key of `dims` in `megamodel.convert.hf_config`. `{layer}` and `{expert}` count from 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class TensorRow:
    """One kind of tensor. `shape` is the one on disk."""

    theirs: str
    ours: str
    shape: tuple[str, ...]
    where: Literal["model", "untied", "every_layer", "dense_layer", "moe_layer"]
    """Once in the model; once, unless embeddings are tied; or once in each such layer."""
    expert_of_stack: bool = False
    """One tensor an expert on disk; ours is the stack of all experts, each transposed."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of Hugging Face transformers."""

    model_type: str
    architecture: str
    rows: tuple[TensorRow, ...]
    fields: Mapping[str, str]
    """Key of config.json -> field of ModelConfig ("moe.x": of its MoEConfig)."""
    defaults: Mapping[str, Any]
    """What transformers takes for a key of `fields` that config.json leaves out; a key that is not here must be there."""
    constants: Mapping[str, tuple[Any, ...]]
    """Keys whose meaning this decoder has for these values only (an absent key means the first)."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other spellings of a key."""


_ATTENTION = (
    TensorRow(
        "model.layers.{layer}.input_layernorm.weight",
        "layers.{layer}.attention_norm.weight",
        ("d_model",),
        "every_layer",
    ),
    TensorRow(
        "model.layers.{layer}.self_attn.q_proj.weight",
        "layers.{layer}.attention.q_proj.weight",
        ("q_width", "d_model"),
        "every_layer",
    ),
    TensorRow(
        "model.layers.{layer}.self_attn.k_proj.weight",
        "layers.{layer}.attention.k_proj.weight",
        ("kv_width", "d_model"),
        "every_layer",
    ),
    TensorRow(
        "model.layers.{layer}.self_attn.v_proj.weight",
        "layers.{layer}.attention.v_proj.weight",
        ("kv_width", "d_model"),
        "every_layer",
    ),
    TensorRow(
        "model.layers.{layer}.self_attn.o_proj.weight",
        "layers.{layer}.attention.o_proj.weight",
        ("d_model", "q_width"),
        "every_layer",
    ),
    TensorRow(
        "model.layers.{layer}.post_attention_layernorm.weight",
        "layers.{layer}.mlp_norm.weight",
        ("d_model",),
        "every_layer",
    ),
)
_QK_NORM = (
    TensorRow(
        "model.layers.{layer}.self_attn.q_norm.weight",
        "layers.{layer}.attention.q_norm.weight",
        ("head_dim",),
        "every_layer",
    ),
    TensorRow(
        "model.layers.{layer}.self_attn.k_norm.weight",
        "layers.{layer}.attention.k_norm.weight",
        ("head_dim",),
        "every_layer",
    ),
)
_DENSE = (
    TensorRow(
        "model.layers.{layer}.mlp.gate_proj.weight",
        "layers.{layer}.mlp.gate_proj.weight",
        ("d_ff", "d_model"),
        "dense_layer",
    ),
    TensorRow(
        "model.layers.{layer}.mlp.up_proj.weight",
        "layers.{layer}.mlp.up_proj.weight",
        ("d_ff", "d_model"),
        "dense_layer",
    ),
    TensorRow(
        "model.layers.{layer}.mlp.down_proj.weight",
        "layers.{layer}.mlp.down_proj.weight",
        ("d_model", "d_ff"),
        "dense_layer",
    ),
)
_EMBEDDING = (TensorRow("model.embed_tokens.weight", "embedding.weight", ("vocab_size", "d_model"), "model"),)
_HEAD = (
    TensorRow("model.norm.weight", "final_norm.weight", ("d_model",), "model"),
    TensorRow("lm_head.weight", "lm_head.weight", ("vocab_size", "d_model"), "untied"),
)


def _experts(block: str, gate: str, up: str, down: str) -> tuple[TensorRow, ...]:
    """The router and the experts below `model.layers.N.<block>`, whose three matrices go by these names."""
    theirs, ours = "model.layers.{layer}." + block, "layers.{layer}.moe"
    expert = theirs + ".experts.{expert}."
    wide, narrow = ("expert_d_ff", "d_model"), ("d_model", "expert_d_ff")
    return (
        TensorRow(f"{theirs}.gate.weight", f"{ours}.router.weight", ("num_experts", "d_model"), "moe_layer"),
        TensorRow(f"{expert}{gate}.weight", f"{ours}.experts.w_gate_EDF", wide, "moe_layer", True),
        TensorRow(f"{expert}{up}.weight", f"{ours}.experts.w_up_EDF", wide, "moe_layer", True),
        TensorRow(f"{expert}{down}.weight", f"{ours}.experts.w_down_EFD", narrow, "moe_layer", True),
    )


_COMMON_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "num_hidden_layers": "num_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "d_ff",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}
_MOE_FIELDS = {"num_experts_per_tok": "moe.top_k", "router_aux_loss_coef": "moe.aux_loss_weight"}
# A default of "$key" is the value of another key; "$head_width" is hidden_size / num_attention_heads.
_COMMON_DEFAULTS = {"tie_word_embeddings": False, "initializer_range": 0.02, "head_dim": "$head_width"}
_COMMON_CONSTANTS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "partial_rotary_factor": (1.0, None),
}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    rows=(*_EMBEDDING, *_ATTENTION, *_DENSE, *_HEAD),
    fields=_COMMON_FIELDS,
    defaults={**_COMMON_DEFAULTS, "rms_norm_eps": 1e-6, "num_key_value_heads": "$num_attention_heads"},
    constants={**_COMMON_CONSTANTS, "mlp_bias": (False,), "pretraining_tp": (1, None)},
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    rows=(*_EMBEDDING, *_ATTENTION, *_QK_NORM, *_DENSE, *_HEAD),
    fields=_COMMON_FIELDS,
    defaults={**_COMMON_DEFAULTS, "rms_norm_eps": 1e-6, "head_dim": 128},
    constants={**_COMMON_CONSTANTS, "use_sliding_window": (False,)},
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rows=(
        *_EMBEDDING,
        *_ATTENTION,
        *_QK_NORM,
        *_DENSE,
        *_experts("mlp", "gate_proj", "up_proj", "down_proj"),
        *_HEAD,
    ),
    fields={
        **_COMMON_FIELDS,
        **_MOE_FIELDS,
        "num_experts": "moe.num_experts",
        "moe_intermediate_size": "moe.d_ff",
        "norm_topk_prob": "moe.normalize_gates",
    },
    defaults={**_COMMON_DEFAULTS, "rms_norm_eps": 1e-6, "router_aux_loss_coef": 0.001, "norm_topk_prob": False},
    constants={**_COMMON_CONSTANTS, "use_sliding_window": (False,)},
    aliases={"num_local_experts": "num_experts"},
)
MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    rows=(*_EMBEDDING, *_ATTENTION, *_experts("block_sparse_moe", "w1", "w3", "w2"), *_HEAD),
    # Every layer holds experts, so the one hidden width is theirs.
    fields={
        **{key: ours for key, ours in _COMMON_FIELDS.items() if key != "intermediate_size"},
        **_MOE_FIELDS,
        "num_local_experts": "moe.num_experts",
        "intermediate_size": "moe.d_ff",
    },
    defaults={**_COMMON_DEFAULTS, "rms_norm_eps": 1e-5, "router_aux_loss_coef": 0.001},
    constants={**_COMMON_CONSTANTS, "sliding_window": (None,), "router_jitter_noise": (0.0, None)},
    aliases={"num_experts": "num_local_experts"},
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (LLAMA, QWEN3, QWEN3_MOE, MIXTRAL)}

DEFAULT_ROPE_THETA: Mapping[str, float] = {
    "llama": 10_000.0,
    "qwen3": 10_000.0,
    "qwen3_moe": 10_000.0,
    "mixtral": 1_000_000.0,
}

# Keys that change nothing about what the forward pass computes: bookkeeping, token ids, and what only training uses.
HARMLESS_KEYS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "max_window_layers",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

# Keys that `hf_config` reads by rules of its own.
RULED_KEYS = frozenset(
    {
        "decoder_sparse_step",
        "layer_types",
        "mlp_only_layers",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
    }
)

# Computed from config.json by every reader; old files hold them all the same.
DERIVED_TENSOR_SUFFIX = ".rotary_emb.inv_freq"
