"""Attention for rows whose tokens are spread over the context axis (`cp`): three ways, each the same sum.

| method       | moves                        | scales to              | asks for                       |
|--------------|------------------------------|------------------------|--------------------------------|
| "all_gather" | keys and values, at once     | rows whose k, v fit    | nothing; the least latency     |
| "ring"       | keys and values, step by step| any row: linear memory | compute long enough to overlap |
| "ulysses"    | heads for tokens             | cp <= query heads      | query heads that cp divides    |

Each has the shape of the model's `AttentionCore`. Tokens lie zig-zag (see `parallel.context_order`), and whoever cuts rows
cuts positions with them: rotary tables, labels, document ids.

Shape suffixes: B batch, S sequence (this rank's part, S = row / cp), H query heads, G key and value heads, D width of a head,
Q queries, K keys, N elements, M messages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import _disable_current_modes

from parallel import collectives
from parallel.config import ContextMethod
from parallel.context_order import chunk_length, chunks_of, gather_documents, gather_rows, true_order, visible
from parallel.context_ring import RingAttention
from parallel.errors import ParallelError
from parallel.mesh import Axis


class LocalAttention(Protocol):
    """Softmax attention over whole rows in one process: the model's `AttentionCore`."""

    def prepare(self, document_ids_BS: Tensor | None, num_queries: int, num_keys: int, device: torch.device) -> Any:
        """Whatever all layers of one forward pass share, such as a mask."""
        ...

    def __call__(self, q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, prepared: Any) -> Tensor:
        """Causal attention within each document; returns (B, H, S, width of v)."""
        ...


def context_attention(
    method: ContextMethod, axis: Axis, inner: LocalAttention, window: int | None = None
) -> LocalAttention:
    """The attention core for rows spread over `axis`; `inner` itself where the axis is not split and there is no window.

    `window`: a query at p sees keys after p - window only. Raises `ParallelError` for an unknown method. No communication.
    """
    if method not in get_args(ContextMethod):
        raise ParallelError(f"no context method {method!r}: set parallel.context_method to one of {_listed()}")
    if not axis.is_split and window is None:
        return inner
    if method == "all_gather":
        return AllGatherAttention(axis, window)
    if method == "ring":
        return RingAttention(axis, window)
    return UlyssesAttention(axis, inner, window)


def _listed() -> str:
    return ", ".join(f'"{name}"' for name in get_args(ContextMethod))


@dataclass(frozen=True, kw_only=True)
class ChunkView:
    """What one chunk of queries sees: these positions of a row, by a (B or 1, 1, Q, K) mask, or None: causal to the end."""

    keys: range
    mask: Tensor | None


class AllGatherAttention:
    """An `AttentionCore` in which every rank gathers all keys and values of its rows (as Llama 3, section 3.3.2).

    Every rank of the axis calls `prepare` and `__call__`, and runs the backward, in the same order. With e bytes an element
    and P = B G S (width of k + width of v) elements of a rank's keys and values:

    - `prepare`: with documents one all-gather of 4 B S bytes a rank (int32 ids), else nothing;
    - forward: one all-gather, e P bytes in from each rank, e P cp out;
    - backward: one reduce-scatter, e P cp bytes in, e P out. It sums in the dtype of k and v.

    Documents or a window cost a mask of B S row bytes (1 S row without documents), once a forward pass.
    """

    def __init__(self, axis: Axis, window: int | None = None) -> None:
        self.axis = axis
        self.window = window

    @torch.compiler.disable
    def prepare(
        self, document_ids_BS: Tensor | None, num_queries: int, num_keys: int, device: torch.device
    ) -> tuple[ChunkView, ...]:
        """From this rank's document ids (B, S), or None; `num_queries` = `num_keys` = S, this rank's tokens of a row."""
        assert num_queries == num_keys, "context parallelism has no cache of keys"
        documents_BS = gather_documents(document_ids_BS, self.axis)
        length = chunk_length(num_queries * self.axis.size, self.axis.size)
        return tuple(
            self._view(chunk, length, documents_BS, device) for chunk in chunks_of(self.axis.rank, self.axis.size)
        )

    def _view(self, chunk: int, length: int, documents_BS: Tensor | None, device: torch.device) -> ChunkView:
        queries = range(chunk * length, (chunk + 1) * length)
        keys = range(0 if self.window is None else max(0, queries.start - self.window + 1), queries.stop)
        if documents_BS is None and self.window is None:
            return ChunkView(keys=keys, mask=None)
        mask = visible(queries, keys, documents_BS=documents_BS, window=self.window, device=device)
        return ChunkView(keys=keys, mask=mask)

    @torch.compiler.disable
    def __call__(self, q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, prepared: tuple[ChunkView, ...]) -> Tensor:
        """Causal attention within each document (and window), over whole rows; returns (B, H, S, width of v)."""
        widths = (k_BGSD.shape[-1], v_BGSD.shape[-1])
        whole = gather_rows(torch.cat((k_BGSD, v_BGSD), dim=-1), self.axis, dim=2)
        k_BGSD, v_BGSD = whole.split(widths, dim=-1)
        outs = []
        for q, view in zip(q_BHSD.chunk(len(prepared), dim=2), prepared, strict=True):
            keys = slice(view.keys.start, view.keys.stop)
            outs.append(_attend_to_end(q, k_BGSD[:, :, keys], v_BGSD[:, :, keys], view.mask))
        return torch.cat(outs, dim=2)


class UlyssesAttention:
    """An `AttentionCore` that trades heads for tokens: whole rows in true order, on H / cp query heads, for `inner`.

    DeepSpeed-Ulysses (Jacobs et al. 2023), section 3. Key heads that cp does not divide are repeated to L = lcm(G, cp)
    heads first (L = G where cp divides G). With a window, masked attention of torch takes the place of `inner`.

    Every rank of the axis calls `prepare` and `__call__`, and runs the backward, in the same order. With e bytes an element:

    - `prepare`: with documents one all-gather of 4 B S bytes a rank (int32 ids), else nothing;
    - forward: two all-to-alls: q, k, v together, e B S (H width_k + L (width_k + width_v)) bytes a rank, and the output,
      e B S H width_v; of each the part (cp - 1) / cp leaves the rank;
    - backward: the same two the other way round, the same bytes.
    """

    def __init__(self, axis: Axis, inner: LocalAttention, window: int | None = None) -> None:
        self.axis = axis
        self.inner = inner if window is None else _WindowAttention(window)

    @torch.compiler.disable
    def prepare(self, document_ids_BS: Tensor | None, num_queries: int, num_keys: int, device: torch.device) -> Any:
        """From this rank's document ids (B, S), or None; `num_queries` = `num_keys` = S, this rank's tokens of a row."""
        assert num_queries == num_keys, "context parallelism has no cache of keys"
        row = num_queries * self.axis.size
        chunk_length(row, self.axis.size)
        return self.inner.prepare(gather_documents(document_ids_BS, self.axis), row, row, device)

    @torch.compiler.disable
    def __call__(self, q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, prepared: Any) -> Tensor:
        """See `AttentionCore`; returns (B, H, S, width of v). Raises `ParallelError` if cp does not divide the query heads."""
        heads, groups, size = q_BHSD.shape[1], k_BGSD.shape[1], self.axis.size
        if heads % size:
            raise ParallelError(
                f"Ulysses needs query heads that cp divides, but a rank has {heads} and parallel.cp is {size}: "
                'set parallel.cp to a divisor of them, or parallel.context_method to "ring" or "all_gather"'
            )
        repeats = math.lcm(groups, size) // groups
        k_BGSD, v_BGSD = _repeat_heads(k_BGSD, repeats), _repeat_heads(v_BGSD, repeats)
        q, k, v = self._to_heads((q_BHSD, k_BGSD, v_BGSD))
        return self._to_tokens(self.inner(q, k, v, prepared))

    def _to_heads(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """All heads of this rank's tokens to some heads of all tokens, in true order: one all-to-all for all tensors."""
        size = self.axis.size
        if size == 1:
            return list(parts)
        # (B, h cp, 2 C, D) -> cp (to whom), 2 (chunk), B, h, C, D: a message is one chunk of one rank's heads.
        messages = [x.unflatten(2, (2, -1)).unflatten(1, (size, -1)).permute(1, 3, 0, 2, 4, 5) for x in parts]
        packed_MN = torch.cat([message.reshape(2 * size, -1) for message in messages], dim=1)
        chunks = collectives.all_to_all(packed_MN, self.axis, send=[2] * size, receive=[2] * size).unbind(0)
        packed_MN = torch.stack([chunks[at] for at in true_order(size)])
        shapes = [message.shape[2:] for message in messages]
        arrived = packed_MN.split([shape.numel() for shape in shapes], dim=1)
        return [
            x.unflatten(1, shape).permute(1, 2, 0, 3, 4).flatten(2, 3) for x, shape in zip(arrived, shapes, strict=True)
        ]

    def _to_tokens(self, x_BHSD: Tensor) -> Tensor:
        """The way back: some heads of all tokens, in true order, to all heads of this rank's. One all-to-all."""
        size = self.axis.size
        if size == 1:
            return x_BHSD
        chunks = x_BHSD.chunk(2 * size, dim=2)
        sent = torch.stack([chunks[chunk] for rank in range(size) for chunk in chunks_of(rank, size)])
        received = collectives.all_to_all(sent, self.axis, send=[2] * size, receive=[2] * size)
        # cp (from whom), 2 (chunk), B, h, C, D -> B, h cp, 2 C, D
        return received.unflatten(0, (size, 2)).permute(2, 0, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)


class _WindowAttention:
    """`LocalAttention` with a sliding window, on torch's fused attention with a mask of whole rows."""

    def __init__(self, window: int) -> None:
        self.window = window

    def prepare(self, document_ids_BS: Tensor | None, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        row = range(num_queries)
        return visible(row, row, documents_BS=document_ids_BS, window=self.window, device=device)

    def __call__(self, q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, prepared: Tensor) -> Tensor:
        return _attend_to_end(q_BHSD, k_BGSD, v_BGSD, prepared)


def _attend_to_end(q_BHQD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, mask: Tensor | None) -> Tensor:
    """torch's fused attention, by a mask or causal with the last query at the last key."""
    heads, groups = q_BHQD.shape[1], k_BGKD.shape[1]
    if mask is None:
        with (
            _disable_current_modes()
        ):  # a mode that watches operators, such as the ledger, refuses a new tensor subclass
            bias: Any = causal_lower_right(q_BHQD.shape[2], k_BGKD.shape[2])
        return F.scaled_dot_product_attention(q_BHQD, k_BGKD, v_BGKD, attn_mask=bias, enable_gqa=heads != groups)
    if q_BHQD.is_cuda:  # no fused kernel there takes both a mask and fewer key heads: torch would make all scores
        k_BGKD, v_BGKD = (_repeat_heads(x, heads // groups) for x in (k_BGKD, v_BGKD))
    enable_gqa = heads != k_BGKD.shape[1]
    return F.scaled_dot_product_attention(q_BHQD, k_BGKD, v_BGKD, attn_mask=mask, enable_gqa=enable_gqa)


def _repeat_heads(x_BGSD: Tensor, repeats: int) -> Tensor:
    """Each head `repeats` times in a row. Backward sums over the copies."""
    return x_BGSD if repeats == 1 else x_BGSD[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)
