"""What a run asks of its layout, and where its pipeline is cut. Imports without torch, so that checks answer at once."""

from __future__ import annotations

from dataclasses import dataclass

from megamodel.model.config import ModelConfig
from megamodel.train.config import TrainConfig
from parallel.config import ParallelConfig
from parallel.layout import Layout, LayoutDemands, micro_batch_size, num_micro_batches, resolve_layout
from parallel.stages import bubble_fraction, split_layers, stages_per_rank

# What an accelerator multiplies while it moves a byte, roughly: prices the embedding, which moves and does not multiply.
_FLOPS_PER_BYTE = 100.0


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """Training cost of the parts of a decoder, in floating-point operations a token."""

    layers: tuple[float, ...]
    embedding: float
    head: float


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """How a run is laid out."""

    layout: Layout
    layers_of_stages: tuple[int, ...]
    """Layers of each pipeline stage; one entry without a pipeline."""
    micro_batch_size: int
    """Samples of one forward pass on one data rank."""
    num_micro_batches: int
    """Forward passes of one data rank in an optimizer step."""
    expected_bubble: float
    """Share of a step in which a rank waits for its pipeline, if all stages took equally long."""


def layout_demands(model: ModelConfig, train: TrainConfig, *, seq_len: int, device: str = "auto") -> LayoutDemands:
    """The numbers that a layout must divide."""
    moe = model.moe
    return LayoutDemands(
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=None if model.mla else model.num_kv_heads,
        vocab_size=model.vocab_size,
        d_ff=model.d_ff if model.num_moe_layers < model.num_layers else None,
        num_experts=moe.num_experts if moe else None,
        expert_d_ff=moe.d_ff if moe else None,
        shared_d_ff=moe.num_shared_experts * moe.d_ff if moe and moe.num_shared_experts else None,
        seq_len=seq_len,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        compile=train.compile,
        optimizer=train.optimizer.name,
        device=device,
    )


def run_plan(
    model: ModelConfig, train: TrainConfig, parallel: ParallelConfig, *, seq_len: int, world_size: int
) -> RunPlan:
    """The layout of a run that has no `layout_problems`. Raises ParallelError where the degrees do not make up the world."""
    layout = resolve_layout(parallel, world_size)
    demands = layout_demands(model, train, seq_len=seq_len)
    num_micro = num_micro_batches(parallel, layout, demands)
    held = stages_per_rank(parallel.pipeline_schedule, parallel.pipeline_stages_per_rank)
    return RunPlan(
        layout=layout,
        layers_of_stages=layers_of_stages(model, parallel, seq_len=seq_len),
        micro_batch_size=micro_batch_size(parallel, layout, demands),
        num_micro_batches=num_micro,
        expected_bubble=bubble_fraction(
            parallel.pipeline_schedule, layout.pp, num_micro, held, split_backward=splits_backward(train)
        ),
    )


def splits_backward(train: TrainConfig, *, compiled: bool | None = None) -> bool:
    """Whether a pipeline stage may compute its weights' gradients apart: neither a compiled block nor one whose activations
    are recomputed or moved can be walked twice. Before a run knows, `compile = "auto"` counts as compiled."""
    if compiled is None:
        compiled = train.compile != "off"
    return not compiled and train.activation_memory.mode == "none"


def layers_of_stages(model: ModelConfig, parallel: ParallelConfig, *, seq_len: int) -> tuple[int, ...]:
    """Layers of each pipeline stage in order: as configured, else where the most expensive stage is cheapest."""
    if parallel.pp == 1:
        return (model.num_layers,)
    if parallel.pipeline_split is not None:
        return tuple(parallel.pipeline_split)
    costs = layer_costs(model, seq_len=seq_len)
    return split_layers(
        costs.layers,
        embedding_cost=costs.embedding,
        head_cost=costs.head,
        num_stages=parallel.pp * stages_per_rank(parallel.pipeline_schedule, parallel.pipeline_stages_per_rank),
    )


def layer_costs(model: ModelConfig, *, seq_len: int) -> LayerCosts:
    """Forward and backward, counted as `megamodel.model.size.training_flops_per_token` does: layers and head add up to it.

    The embedding multiplies nothing; it is priced by what it moves in float32: a row read and written, its gradient
    added to a row.
    """
    attention = 6.0 * _attention_weights(model) + 6.0 * model.num_heads * _attention_width(model) * seq_len
    dense = 6.0 * 3 * model.d_model * model.d_ff
    layers = tuple(
        attention + (6.0 * _expert_weights(model) if model.is_moe_layer(layer) else dense)
        for layer in range(model.num_layers)
    )
    return LayerCosts(
        layers=layers,
        embedding=_FLOPS_PER_BYTE * 5 * 4 * model.d_model,
        head=6.0 * model.d_model * model.vocab_size,
    )


def _attention_weights(model: ModelConfig) -> int:
    """Parameters of one layer's attention that are multiplied."""
    d, heads, mla = model.d_model, model.num_heads, model.mla
    if mla is None:
        return d * model.head_dim * 2 * (heads + model.num_kv_heads)
    queries = mla.q_lora_rank * (d + heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim))
    keys = d * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    keys += mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return queries + keys + heads * mla.v_head_dim * d


def _attention_width(model: ModelConfig) -> int:
    """Width of one head's query and of its value, together."""
    mla = model.mla
    return mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim if mla else 2 * model.head_dim


def _expert_weights(model: ModelConfig) -> int:
    """Parameters of one MoE layer that a token is multiplied with: router, chosen experts, shared ones."""
    assert model.moe is not None
    experts = model.moe.top_k + model.moe.num_shared_experts
    return model.d_model * (model.moe.num_experts + 3 * experts * model.moe.d_ff)
