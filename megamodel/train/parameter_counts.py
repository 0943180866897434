"""Numbers in the parameters of one rank, unit by unit (a block, or all that is outside blocks), by formula."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from megamodel.train.communication_facts import RunShape

Matrix = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class UnitCount:
    """How many numbers of a unit one rank holds. `whole`: before sharding over data ranks, as cut by tp, ep and expert_tp."""

    whole: int
    sharded_whole: int
    """Those that FSDP2 shards, and so gathers."""
    kept: int
    """Once sharded: `sharded_whole` shared out, rows rounded up, and the replicated ones."""
    matrices: int
    """Of `whole`, those that Muon updates."""
    kept_matrices: int
    head_whole: int = 0
    """Of `whole`, the output matrix."""

    @property
    def replicated(self) -> int:
        """Held whole beside sharded ones: norms and routers, where they compute in another type."""
        return self.whole - self.sharded_whole


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Parameters that are treated alike."""

    shapes: tuple[Matrix, ...]
    is_expert: bool = False
    is_full_precision: bool = False
    is_matrix: bool = True


def block_count(shape: RunShape, layer: int) -> UnitCount:
    """Of block `layer`, with D d_model: attention D (H + 2 G) w + H w D (or the low-rank one), 3 D F, and norms."""
    model = shape.model
    groups = [_attention(shape), *_norms(shape)]
    if not model.is_moe_layer(layer):
        return _count(shape, [*groups, _swiglu(shape, model.d_ff)])
    assert model.moe is not None
    moe, layout = model.moe, shape.layout
    experts, hidden = moe.num_experts // layout.ep, moe.d_ff // layout.expert_tp
    stacks = ((experts, model.d_model, hidden), (experts, model.d_model, hidden), (experts, hidden, model.d_model))
    groups += [
        _Group(shapes=stacks, is_expert=True),
        _Group(shapes=((moe.num_experts, model.d_model),), is_full_precision=True, is_matrix=False),
    ]
    if moe.num_shared_experts:
        groups.append(_swiglu(shape, moe.num_shared_experts * moe.d_ff))
    return _count(shape, groups)


def root_count(shape: RunShape, *, is_first: bool, is_last: bool) -> UnitCount:
    """Of what a part holds outside its blocks: V D / tp for the embedding and for an output matrix of its own, D."""
    model = shape.model
    table = (model.vocab_size // shape.layout.tp, model.d_model)
    has_head = is_last and not model.tie_embeddings
    has_embedding = is_first or (is_last and model.tie_embeddings)
    groups = []
    if has_embedding or has_head:
        groups.append(_Group(shapes=(table,) * (has_embedding + has_head), is_matrix=False))
    if is_last:
        groups.append(_Group(shapes=((model.d_model,),), is_full_precision=True, is_matrix=False))
    return _count(shape, groups, head_whole=prod(table) if is_last else 0)


def _attention(shape: RunShape) -> _Group:
    model, tp = shape.model, shape.layout.tp
    heads, kv_heads = model.num_heads // tp, max(1, model.num_kv_heads // tp)
    d, w, mla = model.d_model, model.head_dim, model.mla
    if mla is None:
        return _Group(shapes=((heads * w, d), (kv_heads * w, d), (kv_heads * w, d), (d, heads * w)))
    query, value = mla.qk_nope_head_dim + mla.qk_rope_head_dim, mla.v_head_dim
    return _Group(
        shapes=(
            (mla.q_lora_rank, d),
            (heads * query, mla.q_lora_rank),
            (mla.kv_lora_rank + mla.qk_rope_head_dim, d),
            (heads * (mla.qk_nope_head_dim + value), mla.kv_lora_rank),
            (d, heads * value),
        )
    )


def _norms(shape: RunShape) -> list[_Group]:
    model, mla = shape.model, shape.model.mla
    widths = [model.d_model, model.d_model]
    if mla:
        widths += [mla.q_lora_rank, mla.kv_lora_rank]
    elif model.qk_norm:
        widths += [model.head_dim, model.head_dim]
    return [_Group(shapes=tuple((width,) for width in widths), is_full_precision=True, is_matrix=False)]


def _swiglu(shape: RunShape, hidden: int) -> _Group:
    d, local = shape.model.d_model, hidden // shape.layout.tp
    return _Group(shapes=((local, d), (local, d), (d, local)))


def _count(shape: RunShape, groups: list[_Group], head_whole: int = 0) -> UnitCount:
    whole = sharded = kept = matrices = kept_matrices = 0
    # FSDP2 leaves these alone where the rest is of another type.
    replicates = "bf16" in (shape.train.precision, shape.parallel.param_dtype)
    for group in groups:
        ranks = shape.axis_size("edp_shard") if group.is_expert else shape.axis_size("dp_shard", "cp")
        numbers = sum(prod(matrix) for matrix in group.shapes)
        is_sharded = not (group.is_full_precision and replicates)
        own = sum(_shard(matrix, ranks, group.is_expert) for matrix in group.shapes) if is_sharded else numbers
        whole += numbers
        sharded += numbers if is_sharded and not (group.is_expert and ranks == 1) else 0
        kept += own
        if group.is_matrix:
            matrices += numbers
            kept_matrices += own
    return UnitCount(
        whole=whole,
        sharded_whole=sharded,
        kept=kept,
        matrices=matrices,
        kept_matrices=kept_matrices,
        head_whole=head_whole,
    )


def _shard(matrix: Matrix, ranks: int, is_expert: bool) -> int:
    """The largest rank's part: rows are dealt out whole, and of experts, where those do not come out even, the next dim."""
    if is_expert and matrix[0] % ranks and matrix[1] % ranks == 0:
        return prod(matrix) // ranks
    return -(-matrix[0] // ranks) * prod(matrix[1:])
