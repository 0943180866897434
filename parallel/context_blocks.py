"""Attention between a block of queries and a block of keys, as a part of a softmax over more keys than these.

Each block yields its output and the logarithm of its softmax's denominator (log-sum-exp); from these, blocks merge to what
one softmax over all keys gives (online softmax: FlashAttention, Dao et al. 2022, algorithm 1; FlashAttention-2, Dao 2023,
section 3.1). Backward recomputes each block's weights from the merged log-sum-exp (FlashAttention-2, algorithm 2).

torch's fused kernels do it where they can: on a CPU with any mask, on CUDA without one. All else is plain torch.

Shape suffixes: B batch, H query heads, G key and value heads, R query heads a key head serves, Q queries, K keys,
D width of a head (of q and k, or of v).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_aten = torch.ops.aten
_TILE = 512
"""Queries at a time in plain torch: bounds the memory for scores, which is this many times K for each head."""


@dataclass(frozen=True, kw_only=True)
class BlockOutput:
    """A softmax over one block's keys alone. Rows that see none of them: output 0, log-sum-exp -inf."""

    out_BHQD: Tensor
    lse_BHQ: Tensor


@dataclass(frozen=True, kw_only=True)
class BlockGradients:
    """What one block adds to the gradients of its queries, keys and values."""

    q_BHQD: Tensor
    k_BGKD: Tensor
    v_BGKD: Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what outputs, log-sum-exps and gradients are summed: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def attend(q_BHQD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, *, causal: bool, mask: Tensor | None) -> BlockOutput:
    """Attention over one block: all keys visible, or `causal` (Q = K), or by a (B or 1, 1, Q, K) mask, true = visible."""
    kernel = _kernel(q_BHQD, v_BGKD, mask)
    if kernel == "plain":
        return _attend_plainly(q_BHQD, k_BGKD, v_BGKD, causal, mask)
    if kernel == "cuda":
        out, lse = _aten._scaled_dot_product_flash_attention(q_BHQD, k_BGKD, v_BGKD, 0.0, causal)[:2]
        return BlockOutput(out_BHQD=out, lse_BHQ=lse)
    bias = None if mask is None else _as_bias(mask, q_BHQD)
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q_BHQD, k_BGKD, v_BGKD, 0.0, causal, attn_mask=bias)
    if mask is not None:  # the kernel says 0 of a row that sees nothing, as if it had seen a key of weight 1
        lse = lse.masked_fill(~mask.any(dim=-1), float("-inf"))
    return BlockOutput(out_BHQD=out, lse_BHQ=lse)


def attend_backward(
    grad_BHQD: Tensor,
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    merged: BlockOutput,
    *,
    causal: bool,
    mask: Tensor | None,
) -> BlockGradients:
    """One block's part of the gradients. `merged` and `grad_BHQD` are of these queries over ALL their keys."""
    kernel = _kernel(q_BHQD, v_BGKD, mask)
    out_BHQD, lse_BHQ = merged.out_BHQD, merged.lse_BHQ.contiguous()
    if kernel == "plain":
        return _attend_plainly_backward(grad_BHQD, q_BHQD, k_BGKD, v_BGKD, merged, causal, mask)
    if kernel == "cuda":
        q, k, v = flash_cuda_backward(grad_BHQD, q_BHQD, k_BGKD, v_BGKD, out_BHQD, lse_BHQ, causal)
    else:
        bias = None if mask is None else _as_bias(mask, q_BHQD)
        q, k, v = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_BHQD, q_BHQD, k_BGKD, v_BGKD, out_BHQD, lse_BHQ, 0.0, causal, attn_mask=bias
        )
    return BlockGradients(q_BHQD=q, k_BGKD=k, v_BGKD=v)


def merge_into(total: BlockOutput, block: BlockOutput) -> None:
    """Adds a block's keys to a running softmax, in place: o = sum_i exp(lse_i - lse) o_i, lse = log sum_i exp(lse_i)."""
    lse = torch.logaddexp(total.lse_BHQ, block.lse_BHQ)
    shift = lse.masked_fill(lse == float("-inf"), 0.0)  # no key seen yet: -inf - -inf would be NaN
    total.out_BHQD.mul_((total.lse_BHQ - shift).exp()[..., None])
    total.out_BHQD.addcmul_(block.out_BHQD.to(total.out_BHQD.dtype), (block.lse_BHQ - shift).exp()[..., None])
    total.lse_BHQ.copy_(lse)


def flash_cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of CUDA's flash attention over dense (not ragged) rows without dropout: both leave arguments unused."""
    no_seed = torch.zeros(2, dtype=torch.int64, device=q.device)
    result: tuple[Tensor, Tensor, Tensor] = _aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, no_seed, no_seed
    )
    return result


def _kernel(q_BHQD: Tensor, v_BGKD: Tensor, mask: Tensor | None) -> Literal["cpu", "cuda", "plain"]:
    width = q_BHQD.shape[-1]
    if width != v_BGKD.shape[-1]:
        return "plain"
    if q_BHQD.device.type == "cpu":
        return "cpu"
    half = q_BHQD.dtype in (torch.bfloat16, torch.float16)
    fits = half and mask is None and width % 8 == 0 and width <= 256
    return "cuda" if fits and q_BHQD.device.type == "cuda" else "plain"


def _as_bias(mask: Tensor, q_BHQD: Tensor) -> Tensor:
    batch, heads = q_BHQD.shape[:2]
    bias = torch.zeros(mask.shape, dtype=q_BHQD.dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    return bias.expand(batch, heads, -1, -1)


def _tiles(num_queries: int) -> list[slice]:
    return [slice(start, min(start + _TILE, num_queries)) for start in range(0, num_queries, _TILE)]


def _fold(x_BHQD: Tensor, num_groups: int) -> Tensor:
    """Query heads that share a key head, side by side: (B, G, R, Q, D)."""
    return x_BHQD.unflatten(1, (num_groups, -1))


def _scores(q_BGRQD: Tensor, k_BGKD: Tensor, rows: slice, causal: bool, mask: Tensor | None) -> Tensor:
    """Scaled scores (B, G, R, Q, K) of some queries, -inf where they do not see; K is cut short if causal."""
    keys = k_BGKD[:, :, : rows.stop] if causal else k_BGKD
    scores = torch.einsum("bgrqd,bgkd->bgrqk", q_BGRQD[:, :, :, rows], keys) * k_BGKD.shape[-1] ** -0.5
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(rows.start)
        return scores.masked_fill_(~seen, float("-inf"))
    return scores if mask is None else scores.masked_fill_(~mask[:, :, None, rows], float("-inf"))


def _attend_plainly(q_BHQD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, causal: bool, mask: Tensor | None) -> BlockOutput:
    dtype = accumulator_dtype(q_BHQD.dtype)
    q_BGRQD, k, v = _fold(q_BHQD.to(dtype), k_BGKD.shape[1]), k_BGKD.to(dtype), v_BGKD.to(dtype)
    outs, lses = [], []
    for rows in _tiles(q_BHQD.shape[2]):
        scores = _scores(q_BGRQD, k, rows, causal, mask)
        lse = scores.logsumexp(dim=-1)
        weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp_()
        outs.append(torch.einsum("bgrqk,bgkd->bgrqd", weights, v[:, :, : weights.shape[-1]]).flatten(1, 2))
        lses.append(lse.flatten(1, 2))
    return BlockOutput(out_BHQD=torch.cat(outs, dim=2), lse_BHQ=torch.cat(lses, dim=2))


def _attend_plainly_backward(
    grad_BHQD: Tensor,
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    merged: BlockOutput,
    causal: bool,
    mask: Tensor | None,
) -> BlockGradients:
    dtype, groups = accumulator_dtype(q_BHQD.dtype), k_BGKD.shape[1]
    k, v = k_BGKD.to(dtype), v_BGKD.to(dtype)
    q_BGRQD, grad_BGRQD = _fold(q_BHQD.to(dtype), groups), _fold(grad_BHQD.to(dtype), groups)
    lse_BGRQ = _fold(merged.lse_BHQ, groups)
    delta_BGRQ = _fold((grad_BHQD.to(dtype) * merged.out_BHQD.to(dtype)).sum(dim=-1), groups)
    dq, dk, dv = torch.empty_like(q_BGRQD), torch.zeros_like(k), torch.zeros_like(v)
    for rows in _tiles(q_BHQD.shape[2]):
        weights = (_scores(q_BGRQD, k, rows, causal, mask) - lse_BGRQ[..., rows, None]).exp_()
        seen = slice(0, weights.shape[-1])
        grad = grad_BGRQD[:, :, :, rows]
        dv[:, :, seen] += torch.einsum("bgrqk,bgrqd->bgkd", weights, grad)
        dweights = torch.einsum("bgrqd,bgkd->bgrqk", grad, v[:, :, seen])
        dscores = weights.mul_(dweights.sub_(delta_BGRQ[..., rows, None])).mul_(k.shape[-1] ** -0.5)
        dq[:, :, :, rows] = torch.einsum("bgrqk,bgkd->bgrqd", dscores, k[:, :, seen])
        dk[:, :, seen] += torch.einsum("bgrqk,bgrqd->bgkd", dscores, q_BGRQD[:, :, :, rows])
    return BlockGradients(q_BHQD=dq.flatten(1, 2), k_BGKD=dk, v_BGKD=dv)
