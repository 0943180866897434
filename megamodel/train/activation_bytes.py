"""Bytes that a block keeps between forward and backward, tensor by tensor, as the code in `megamodel.model` makes them.

Without torch.compile, which keeps less: the figures are a bound for it. Symbols of the formulas: `a` bytes of an
activation's number; `n` tokens of this rank between the blocks, B * S / (cp * tp); `g` tokens inside attention and
feed-forward, B * S / cp; D d_model; H, G query and key heads of this rank; F hidden width of this rank; E experts; K top_k;
R routed rows on this rank, n * K when the load is even.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megamodel.model.config import ModelConfig
from megamodel.train.activation_memory import is_treated
from megamodel.train.config import ActivationMemoryConfig
from parallel.config import ContextMethod
from parallel.layout import Layout

FLOAT32, INT64 = 4, 8


@dataclass(frozen=True, kw_only=True)
class ActivationSetting:
    """All that decides what a block of one rank keeps."""

    model: ModelConfig
    layout: Layout
    micro_batch_size: int
    seq_len: int
    activation_bytes: int
    """Bytes of a number in an activation: 4 in fp32, 2 in bf16."""
    casts_weights: bool
    """Weights are kept in another type than activations, and cast where they are used: the cast ones are kept too. Not so
    under FSDP2, which gathers in the activations' type."""
    attention: Literal["sdpa", "explicit"] = "sdpa"
    context_method: ContextMethod = "all_gather"
    document_mask: bool = False
    fused_kernels: bool = False
    """CUDA's kernels: a norm keeps its input alone, attention of unequal head widths makes no matrix of scores, and its
    result need not be copied for the projection."""

    @property
    def tokens_between(self) -> int:
        """n"""
        return self.tokens_inside // self.layout.tp

    @property
    def tokens_inside(self) -> int:
        """g"""
        return self.micro_batch_size * self.seq_len // self.layout.cp

    @property
    def heads(self) -> tuple[int, int]:
        """H and G: of key heads that are fewer than ranks each rank holds one."""
        return self.model.num_heads // self.layout.tp, max(1, self.model.num_kv_heads // self.layout.tp)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One tensor that a block keeps (or several of a kind). `operation`: which operation's result it is, of those that
    `train.activation_memory.save` names; None where no such operation makes it."""

    name: str
    num_bytes: int
    operation: str | None = None


def kept_by_block(setting: ActivationSetting, layer: int, memory: ActivationMemoryConfig) -> dict[str, int]:
    """Bytes by name that block `layer` keeps on its device until its backward, under one mode.

    none: all that autograd saves. full: the block's input, a * n * D. selective: the input, and the results of the chosen
    operations. offload: nothing but what is too small to be moved, which is not counted.
    """
    if not is_treated(layer, memory):
        return _by_name(saved_by_autograd(setting, layer))
    if memory.mode == "offload":
        return {}
    block_input = {"block input": setting.activation_bytes * setting.tokens_between * setting.model.d_model}
    if memory.mode == "full":
        return block_input
    return block_input | _by_name([kept for kept in results(setting, layer) if kept.operation in memory.save])


def saved_by_autograd(setting: ActivationSetting, layer: int) -> list[Kept]:
    """What a block keeps when nothing is recomputed."""
    moe = setting.model.is_moe_layer(layer)
    return [
        *_norm(setting, "attention norm", setting.model.d_model, setting.tokens_between),
        *(_latent_attention(setting) if setting.model.mla else _grouped_attention(setting)),
        *_norm(setting, "mlp norm", setting.model.d_model, setting.tokens_between),
        *(_moe(setting) if moe else _swiglu(setting, "mlp", setting.model.d_ff // setting.layout.tp)),
    ]


def results(setting: ActivationSetting, layer: int) -> list[Kept]:
    """Results of the operations that selective recomputation may keep, whether or not autograd would."""
    model, a, g, n = setting.model, setting.activation_bytes, setting.tokens_inside, setting.tokens_between
    heads, kv_heads = setting.heads
    split = setting.layout.tp > 1
    found = []
    if model.mla:
        mla = model.mla
        width, value = mla.qk_nope_head_dim + mla.qk_rope_head_dim, mla.v_head_dim
        down = mla.q_lora_rank + mla.kv_lora_rank + mla.qk_rope_head_dim
        up = heads * (width + mla.qk_nope_head_dim + value)
        found.append(Kept(name="q, k, v projections", num_bytes=a * g * (down + up), operation="matmul"))
    else:
        width = value = model.head_dim
        found.append(
            Kept(name="q, k, v projections", num_bytes=a * g * (heads + 2 * kv_heads) * width, operation="matmul")
        )
    found += _attention_results(setting, width, value)
    found.append(Kept(name="output projection", num_bytes=a * g * model.d_model, operation="matmul"))
    gathered = Kept(
        name="gathered input and scattered output", num_bytes=a * (g + n) * model.d_model, operation="collective"
    )
    if split:
        found.append(gathered)
    if not model.is_moe_layer(layer):
        hidden = model.d_ff // setting.layout.tp
        found.append(Kept(name="mlp products", num_bytes=a * g * (2 * hidden + model.d_model), operation="matmul"))
        return [*found, gathered] if split else found
    assert model.moe is not None
    moe, rows = model.moe, n * model.moe.top_k
    expert_hidden = moe.d_ff // setting.layout.expert_tp
    expert_rows = rows * setting.layout.expert_tp
    found.append(Kept(name="router logits", num_bytes=FLOAT32 * n * moe.num_experts, operation="matmul"))
    found.append(
        Kept(
            name="expert products",
            num_bytes=a * expert_rows * (2 * expert_hidden + model.d_model),
            operation="matmul",
        )
    )
    if setting.layout.ep * setting.layout.expert_tp > 1:
        exchanged = a * (rows + expert_rows) * model.d_model
        found.append(Kept(name="exchanged rows", num_bytes=exchanged, operation="collective"))
    if moe.num_shared_experts:
        hidden = moe.num_shared_experts * moe.d_ff // setting.layout.tp
        found.append(
            Kept(name="shared expert products", num_bytes=a * g * (2 * hidden + model.d_model), operation="matmul")
        )
        if split:
            found.append(gathered)
    return found


def _norm(setting: ActivationSetting, name: str, width: int, tokens: int, groups: int = 1) -> list[Kept]:
    """The input in float32, 1 / root mean square, and (unless fused) the quotient: 4 * tokens * (2 * width + 1)."""
    copies = 1 if setting.fused_kernels else 2
    return [Kept(name=name, num_bytes=FLOAT32 * tokens * groups * (copies * width + 1))]


def _grouped_attention(setting: ActivationSetting) -> list[Kept]:
    """Input a g D; q, k, v a g (H + 2 G) w, where context parallelism may have gathered k and v of all cp ranks; what the
    core keeps; the projection's input a g H w; cast weights 2 a D (H + G) w."""
    model, a, g = setting.model, setting.activation_bytes, setting.tokens_inside
    heads, kv_heads = setting.heads
    width = model.head_dim
    found = [Kept(name="attention input", num_bytes=a * g * model.d_model)]
    if model.qk_norm:
        found += _norm(setting, "q norm", width, g, heads) + _norm(setting, "k norm", width, g, kv_heads)
    rows = setting.layout.cp if setting.context_method == "all_gather" else 1
    found.append(Kept(name="q, k, v", num_bytes=a * g * (heads + 2 * kv_heads * rows) * width))
    found += _core(setting, width, width)
    if setting.casts_weights:
        weights = model.d_model * width * (2 * heads + 2 * kv_heads)
        found.append(Kept(name="attention weights in the activations' type", num_bytes=a * weights))
    return found


def _latent_attention(setting: ActivationSetting) -> list[Kept]:
    """Input a g D; both latent norms and their results a g (r_q + r_kv); q and k a g H (nope + rope) each; the product
    that v is a part of, a g H (nope + v); what the core keeps; the projection's input a g H v; cast weights."""
    model, a, g = setting.model, setting.activation_bytes, setting.tokens_inside
    assert model.mla is not None
    mla, (heads, _) = model.mla, setting.heads
    width, value = mla.qk_nope_head_dim + mla.qk_rope_head_dim, mla.v_head_dim
    found = [
        Kept(name="attention input", num_bytes=a * g * model.d_model),
        *_norm(setting, "q latent norm", mla.q_lora_rank, g),
        *_norm(setting, "kv latent norm", mla.kv_lora_rank, g),
        Kept(name="latents", num_bytes=a * g * (mla.q_lora_rank + mla.kv_lora_rank)),
    ]
    if setting.fused_kernels or setting.attention == "explicit":
        values = heads * (mla.qk_nope_head_dim + value)
        found.append(Kept(name="q, k, v", num_bytes=a * g * (2 * heads * width + values)))
    found += _core(setting, width, value)
    if setting.casts_weights:
        down = model.d_model * (mla.q_lora_rank + mla.kv_lora_rank + mla.qk_rope_head_dim)
        up = heads * (mla.q_lora_rank * width + mla.kv_lora_rank * (mla.qk_nope_head_dim + value))
        weights = down + up + heads * value * model.d_model
        found.append(Kept(name="attention weights in the activations' type", num_bytes=a * weights))
    return found


def _core(setting: ActivationSetting, width: int, value: int) -> list[Kept]:
    """What attention keeps besides q, k and v: its result and the log-sum-exp of each row, or the scores; then the input
    of the output projection, where that is a copy."""
    a, g = setting.activation_bytes, setting.tokens_inside
    heads, _ = setting.heads
    projected = Kept(name="attention result for the projection", num_bytes=a * g * heads * value)
    if _makes_scores(setting, width, value):
        return [*_scores(setting, width, value), projected]
    fused = _attention_results(setting, width, value)
    is_copy = not setting.fused_kernels or setting.layout.cp > 1
    return [*fused, projected] if is_copy else fused


def _attention_results(setting: ActivationSetting, width: int, value: int) -> list[Kept]:
    """Of a fused kernel: a g H v, and 4 g H."""
    a, g = setting.activation_bytes, setting.tokens_inside
    heads, _ = setting.heads
    if _makes_scores(setting, width, value):
        keys = setting.seq_len
        products = heads * g * (keys + value) * (a if setting.attention == "explicit" else FLOAT32)
        return [Kept(name="scores and attention result", num_bytes=products, operation="matmul")]
    return [
        Kept(name="attention result", num_bytes=a * g * heads * value, operation="attention"),
        Kept(name="attention log-sum-exp", num_bytes=FLOAT32 * g * heads, operation="attention"),
    ]


def _makes_scores(setting: ActivationSetting, width: int, value: int) -> bool:
    # Context parallelism has cores of its own.
    if setting.layout.cp > 1:
        return False
    return setting.attention == "explicit" or (width != value and not setting.fused_kernels)


def _scores(setting: ActivationSetting, width: int, value: int) -> list[Kept]:
    """explicit: weights 4 H g S, rounded ones a H g S, and the mask's inverse. torch without a fused kernel: q, k, v
    and weights in float32, 4 H (g (2 w + v) + g S)."""
    a, g, keys = setting.activation_bytes, setting.tokens_inside, setting.seq_len
    heads, _ = setting.heads
    if setting.attention == "sdpa":
        num_bytes = FLOAT32 * heads * g * (2 * width + value + keys)
        return [Kept(name="q, k, v and attention weights in float32", num_bytes=num_bytes)]
    rounded = a * heads * g * keys if a != FLOAT32 else 0
    rows = g if setting.document_mask else keys
    return [Kept(name="attention weights", num_bytes=FLOAT32 * heads * g * keys + rounded + rows * keys)]


def _swiglu(setting: ActivationSetting, name: str, hidden: int, *, has_own_input: bool = True) -> list[Kept]:
    """Input a g D; gate, silu(gate), up and their product 4 a g F; cast weights 3 a D F."""
    a, g, d_model = setting.activation_bytes, setting.tokens_inside, setting.model.d_model
    found = [Kept(name=f"{name} hidden", num_bytes=4 * a * g * hidden)]
    if has_own_input:
        found.append(Kept(name=f"{name} input", num_bytes=a * g * d_model))
    if setting.casts_weights:
        found.append(Kept(name=f"{name} weights in the activations' type", num_bytes=3 * a * d_model * hidden))
    return found


def _moe(setting: ActivationSetting) -> list[Kept]:
    """Router: input 4 n D, 2 tables of affinities 8 n E, choices and gates 16 n K. Experts: their rows a R D, hidden
    4 a R F, results a R D, two orders 16 R, cast weights 3 a D F E / ep. And the shared expert."""
    model, a, n = setting.model, setting.activation_bytes, setting.tokens_between
    assert model.moe is not None
    moe, rows, layout = model.moe, n * model.moe.top_k, setting.layout
    hidden, expert_rows = moe.d_ff // layout.expert_tp, rows * layout.expert_tp
    found = [
        Kept(name="router input", num_bytes=FLOAT32 * n * model.d_model),
        Kept(name="router", num_bytes=FLOAT32 * n * (2 * moe.num_experts + 4 * moe.top_k + 4)),
        Kept(name="order of rows", num_bytes=2 * INT64 * rows),
        Kept(name="expert input", num_bytes=a * expert_rows * model.d_model),
        Kept(name="expert hidden", num_bytes=4 * a * expert_rows * hidden),
        Kept(name="expert results", num_bytes=a * rows * (model.d_model + 1)),
    ]
    if setting.casts_weights:
        weights = 3 * model.d_model * hidden * moe.num_experts // layout.ep
        found.append(Kept(name="expert weights in the activations' type", num_bytes=a * weights))
    if moe.num_shared_experts:
        # In fp32 and with whole rows its input is the router's.
        own = layout.tp > 1 or a != FLOAT32
        shared = moe.num_shared_experts * moe.d_ff // layout.tp
        found += _swiglu(setting, "shared expert", shared, has_own_input=own)
    return found


def _by_name(kept: list[Kept]) -> dict[str, int]:
    found: dict[str, int] = {}
    for tensor in kept:
        found[tensor.name] = found.get(tensor.name, 0) + tensor.num_bytes
    return found
