"""Shape of the decoder. Imports without torch."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megamodel.model.presets import PRESETS

_SECTION = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class MoEConfig(BaseModel):
    """Mixture-of-experts layers: which layers, how many experts, and how the router chooses and balances."""

    model_config = _SECTION

    num_experts: int = Field(gt=0)
    """Routed experts in each MoE layer."""
    top_k: int = Field(gt=0)
    """Experts that each token is sent to."""
    d_ff: int = Field(gt=0)
    """Hidden width of one routed expert."""
    num_shared_experts: int = Field(default=0, ge=0)
    """Experts that every token passes besides the routed ones; they form one SwiGLU of num_shared_experts * d_ff."""
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become affinities: softmax over experts, or a sigmoid each (DeepSeek-V3)."""
    normalize_gates: bool = True
    """Divide the chosen affinities by their sum, so that a token's gates add up to gate_scale."""
    gate_scale: float = Field(default=1.0, gt=0)
    """Factor on the gates after normalisation."""
    balance: Literal["none", "aux_loss", "bias"] = "aux_loss"
    """How load is balanced: not at all, by a loss on each sequence's routing, or by a selection bias without a loss."""
    aux_loss_weight: float = Field(default=0.01, ge=0)
    """Weight of the balance loss (balance = "aux_loss")."""
    bias_update_rate: float = Field(default=0.001, gt=0)
    """Step of the selection bias after each optimizer step (balance = "bias")."""
    z_loss_weight: float = Field(default=0.0, ge=0)
    """Weight of the router z-loss, the mean squared log-sum-exp of the router logits."""
    first_layer: int = Field(default=0, ge=0)
    """First layer that is MoE; those before it are dense."""
    every: int = Field(default=1, gt=0)
    """From first_layer on, each every-th layer is MoE and the rest are dense."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k ({self.top_k}) must not exceed num_experts ({self.num_experts})")
        return self


class MLAConfig(BaseModel):
    """Multi-head latent attention (DeepSeek-V2, section 2.1): low-rank queries, keys and values."""

    model_config = _SECTION

    q_lora_rank: int = Field(gt=0)
    """Width of the compressed query."""
    kv_lora_rank: int = Field(gt=0)
    """Width of the compressed key and value."""
    qk_nope_head_dim: int = Field(gt=0)
    """Width of a head's query and key without position."""
    qk_rope_head_dim: int = Field(gt=0)
    """Width of a head's rotary query, and of the one rotary key that all heads share."""
    v_head_dim: int = Field(gt=0)
    """Width of a head's value."""


class ModelConfig(BaseModel):
    """Shape of a pre-norm decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, dense or MoE layers."""

    model_config = _SECTION

    preset: str | None = None
    """Named shape that fills every field not given here; `mega config show` prints the result."""
    vocab_size: int = Field(gt=0)
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    max_seq_len: int = Field(gt=0)
    """Longest sequence that the model is meant for, in tokens."""
    num_layers: int = Field(gt=0)
    """Decoder blocks."""
    d_model: int = Field(gt=0)
    """Width of the residual stream."""
    num_heads: int = Field(gt=0)
    """Query heads."""
    num_kv_heads: int = Field(gt=0)
    """Key and value heads; each serves num_heads / num_kv_heads query heads."""
    head_dim: int = Field(gt=0)
    """Width of one head."""
    d_ff: int = Field(gt=0)
    """Hidden width of the SwiGLU in dense layers."""
    qk_norm: bool = False
    """RMSNorm on each head's query and key before the rotation."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Use the embedding as the output matrix too."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights; projections back into the residual stream get init_std / sqrt(2 * num_layers)."""
    moe: MoEConfig | None = None
    """MoE layers; none: all layers are dense."""
    mla: MLAConfig | None = None
    """Multi-head latent attention in place of grouped-query attention."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not data.get("preset"):
            return data
        name = data["preset"]
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
        merged = {**PRESETS[name], **data}
        for section in ("moe", "mla"):
            if isinstance(data.get(section), dict):
                merged[section] = {**(PRESETS[name].get(section) or {}), **data[section]}
        return merged

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        rotary = self.mla.qk_rope_head_dim if self.mla else self.head_dim
        if rotary % 2:
            raise ValueError(f"rotary positions need an even head width, not {rotary}")
        if self.moe and self.moe.first_layer >= self.num_layers:
            raise ValueError(f"moe.first_layer ({self.moe.first_layer}) must be below num_layers ({self.num_layers})")
        if self.moe and (self.d_model % 8 or self.moe.d_ff % 8):
            # Grouped products want rows of 16-byte multiples, which in bf16 are 8 numbers.
            raise ValueError(
                f"with MoE, d_model ({self.d_model}) and moe.d_ff ({self.moe.d_ff}) must be multiples of 8"
            )
        return self

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` (from 0) holds experts."""
        return (
            self.moe is not None
            and layer >= self.moe.first_layer
            and (layer - self.moe.first_layer) % self.moe.every == 0
        )

    @property
    def num_moe_layers(self) -> int:
        """Blocks that hold experts."""
        return sum(self.is_moe_layer(layer) for layer in range(self.num_layers))
