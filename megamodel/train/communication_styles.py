"""Formulas of what tensor, context, expert and pipeline parallelism send.

Symbols, of a micro batch on one rank: B rows, S tokens of a row after cp, D width of the model, A = B * S * D; C modules of a
layer that are cut over tp (attention, and MLP or shared expert); K top_k, E experts; H query heads and G key and value heads
on this rank (after tp), k and v their widths, P = B * G * S * (k + v); M micro batches; b bytes of an activation's element.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megamodel.train.activation_memory import is_treated
from megamodel.train.communication_data import fsdp_is_at_work
from megamodel.train.communication_facts import DTYPE_NAMES, Expected, PartShare, RunShape, expect

# As ChunkedTokenLoss cuts a micro batch: rows of logits at once, and numbers in them.
_CHUNK_ROWS, _CHUNK_LOGITS = 1024, 2**25


def tensor_terms(shape: RunShape, parts: Sequence[PartShare]) -> Iterator[Expected]:
    """Between blocks a rank has its slice of each row: gathered before, scattered after each cut module, and in the
    backward the other way round."""
    layout, model = shape.layout, shape.model
    if layout.tp == 1:
        return
    slices = shape.tokens * model.d_model
    for part in parts:
        for layer in part.layers:
            # A recomputed block stops before the last thing that it need not do again: the scatter of a dense one's end.
            again = _forwards_again(shape, layer, functional=True)
            moe = model.is_moe_layer(layer)
            cut_modules = 2 if not moe or _has_shared_expert(shape) else 1
            gathers = cut_modules * (2 + again)
            scatters = gathers - (again if not moe else 0)
            for kind, count in (("all_gather", gathers), ("reduce_scatter", scatters)):
                yield expect(
                    "tp", kind, shape.activations, count=count * shape.micro_batches,
                    elements=count * shape.micro_batches * slices,
                    purpose="around attention, MLP and shared expert, forward and backward",
                    formula=f"M * sum(C * {3 if again else 2}) * A * b" + (" (a dense block's end once less)" if again else ""),
                )  # fmt: skip
        for here, dtype, what in (
            (part.is_first, _weight_dtype(shape, part), "embedding"),
            (part.is_last, shape.activations, "end of the blocks"),
        ):
            for kind in ("all_gather", "reduce_scatter") if here else ():
                yield expect(
                    "tp", kind, dtype, count=shape.micro_batches, elements=shape.micro_batches * slices,
                    purpose=f"{what}, forward or backward", formula="M * A * b",
                )  # fmt: skip
        if part.is_last:
            chunk = min(_CHUNK_ROWS, max(1, _CHUNK_LOGITS // (model.vocab_size // layout.tp)))
            yield expect(
                "tp", "all_reduce", "float32", count=2 * shape.micro_batches * math.ceil(shape.tokens / chunk),
                elements=3 * shape.micro_batches * shape.tokens,
                purpose="loss: per token its largest logit, then the sum of exponentials and the label's logit",
                formula="M * B * S * 3 * 4",
            )  # fmt: skip


def router_terms(shape: RunShape, parts: Sequence[PartShare]) -> Iterator[Expected]:
    """The load of each whole sequence, for its balance loss, where ranks hold parts of sequences."""
    if shape.axis_size("cp", "tp") == 1 or shape.model.moe is None:
        return
    times = sum(
        1 + _forwards_again(shape, layer, functional=True) for part in parts for layer in _moe_layers(shape, part)
    )
    yield expect(
        "cp_tp", "all_reduce", "int64", count=shape.micro_batches * times,
        elements=shape.micro_batches * times * shape.rows * shape.model.moe.num_experts,
        purpose="experts' load in each row", formula="M * MoE layers * B * E * 8",
    )  # fmt: skip


def context_terms(shape: RunShape, parts: Sequence[PartShare]) -> Iterator[Expected]:
    """Attention over rows whose tokens are spread over ranks."""
    cp = shape.layout.cp
    if cp == 1:
        return
    if shape.document_mask:
        count = shape.micro_batches * len(parts)
        yield expect(
            "cp", "all_gather", "int32", count=count, elements=count * shape.rows * shape.seq_len,
            purpose="document ids of whole rows", formula="M * parts * B * S * cp * 4",
        )  # fmt: skip
    heads = _heads(shape)
    for part in parts:
        for layer in part.layers:
            yield from _attention_terms(shape, heads, layer)


@dataclass(frozen=True, kw_only=True)
class _Heads:
    """Query heads, key and value heads of one rank, and their widths."""

    query: int
    key: int
    key_width: int
    value_width: int


def _heads(shape: RunShape) -> _Heads:
    model, tp = shape.model, shape.layout.tp
    query = model.num_heads // tp
    if model.mla is not None:
        width = model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim
        return _Heads(query=query, key=query, key_width=width, value_width=model.mla.v_head_dim)
    key = max(1, model.num_kv_heads // tp)
    return _Heads(query=query, key=key, key_width=model.head_dim, value_width=model.head_dim)


def _attention_terms(shape: RunShape, heads: _Heads, layer: int) -> Iterator[Expected]:
    cp, times, b = shape.layout.cp, shape.micro_batches, shape.activations
    method = shape.parallel.context_method
    block = shape.tokens * heads.key * (heads.key_width + heads.value_width)
    again = _forwards_again(shape, layer, functional=method != "ring")
    if method == "all_gather":
        for kind, count in (("all_gather", 1 + again), ("reduce_scatter", 1)):
            yield expect(
                "cp", kind, b, count=times * count, elements=times * count * block * cp,
                purpose="keys and values" if kind == "all_gather" else "gradients of keys and values",
                formula="M * layers * cp * P * b",
            )  # fmt: skip
    elif method == "ring":
        for kind in ("send", "recv"):
            for dtype, count, what, formula in (
                (b, 2 + again, "keys and values", f"M * layers * {2 + again} * (cp - 1) * P * b"),
                ("float32", 1, "their gradients", "M * layers * (cp - 1) * P * 4"),
            ):
                yield expect(
                    "cp", kind, dtype, count=times * count * (cp - 1), elements=times * count * (cp - 1) * block,
                    purpose=f"{what}, round the ring", formula=formula,
                )  # fmt: skip
    else:
        keys = math.lcm(heads.key, cp)
        there = shape.tokens * (heads.query * heads.key_width + keys * (heads.key_width + heads.value_width))
        back = shape.tokens * heads.query * heads.value_width
        yield expect(
            "cp", "all_to_all", b, count=times * 2 * (2 + again), elements=times * (2 + again) * (there + back),
            purpose="heads for tokens and back, forward and backward",
            formula="M * layers * 2 * B * S * (H * k + lcm(G, cp) * (k + v) + H * v) * b",
        )  # fmt: skip


def expert_terms(shape: RunShape, parts: Sequence[PartShare]) -> Iterator[Expected]:
    """Rows to the ranks that hold their experts, and back."""
    layout, moe = shape.layout, shape.model.moe
    if moe is None or layout.ep * layout.expert_tp == 1:
        return
    layers = [layer for part in parts for layer in _moe_layers(shape, part)]
    again = sum(_forwards_again(shape, layer, functional=True) for layer in layers)
    forwards = shape.micro_batches * (len(layers) + again)
    both = shape.micro_batches * (2 * len(layers) + again)
    axis = "ep_expert_tp"
    yield expect(
        axis, "all_to_all", "int64", count=forwards, elements=forwards * moe.num_experts * layout.expert_tp,
        purpose="rows for each expert", formula="M * MoE layers * E * expert_tp * 8",
    )  # fmt: skip
    rows = shape.tokens // layout.tp * moe.top_k
    yield expect(
        axis, "all_to_all", shape.activations, count=2 * both,
        elements=both * 2 * rows * layout.expert_tp * shape.model.d_model,
        purpose="rows to their experts and results back, forward and backward (mean over ranks)",
        formula="M * MoE layers * 4 * B * S / tp * K * expert_tp * D * b", on_average=True,
    )  # fmt: skip


def pipeline_terms(shape: RunShape, parts: Sequence[PartShare], pp_rank: int) -> Iterator[Expected]:
    """Hidden states to the next stage and their gradients to the one before, where another rank holds it."""
    pp = shape.layout.pp
    if pp == 1:
        return
    rank_of = {stage: rank for rank in range(pp) for stage in shape.stages_of(rank)}
    neighbours = [stage for part in parts for stage in (part.stage - 1, part.stage + 1) if stage in rank_of]
    messages = shape.micro_batches * sum(rank_of[stage] != pp_rank for stage in neighbours)
    hidden = shape.tokens // shape.layout.tp * shape.model.d_model
    for kind in ("send", "recv") if messages else ():
        yield expect(
            "pp", kind, shape.activations, count=messages, elements=messages * hidden,
            purpose="hidden states down, gradients up", formula="M * neighbouring stages elsewhere * A / tp * b",
        )  # fmt: skip


def _forwards_again(shape: RunShape, layer: int, *, functional: bool) -> int:
    """How often a block's forward is run again for its backward, as far as it communicates. Selective recomputation can
    keep what our own collectives gave, which are functional operators; it does not keep messages."""
    memory = shape.train.activation_memory
    if memory.mode not in ("selective", "full") or not is_treated(layer, memory):
        return 0
    return 0 if memory.mode == "selective" and "collective" in memory.save and functional else 1


def _moe_layers(shape: RunShape, part: PartShare) -> list[int]:
    return [layer for layer in part.layers if shape.model.is_moe_layer(layer)]


def _has_shared_expert(shape: RunShape) -> bool:
    return shape.model.moe is not None and shape.model.moe.num_shared_experts > 0


def _weight_dtype(shape: RunShape, part: PartShare) -> str:
    """Of an embedded token: FSDP2 gathers weights in the type of activations, the others keep them in their own."""
    casts = fsdp_is_at_work(shape, [part]) and shape.parallel.param_dtype == "fp32"
    return shape.activations if casts else DTYPE_NAMES[shape.parallel.param_dtype]
