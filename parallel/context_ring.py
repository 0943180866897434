"""Ring attention: queries stay, keys and values travel round the context axis, and partial softmaxes merge as they pass.

Liu, Zaharia, Abbeel 2023, "Ring Attention with Blockwise Transformers", section 3, after the ring self-attention of Li et
al. 2021, "Sequence Parallelism"; with zig-zag chunks each rank has equal work at each step.

Shape suffixes: B batch, S sequence (this rank's part), H query heads, G key and value heads, D width of a head, N elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.context_blocks import BlockOutput, accumulator_dtype, attend, attend_backward, merge_into
from parallel.context_order import chunk_length, chunks_of, gather_documents, visible
from parallel.mesh import Axis

_TILE = 512
"""Queries a masked piece has at most: bounds the mask, and cuts off keys that all of them find outside the window."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Local queries and keys of a visiting block between which something is visible: all, or by `mask_of`."""

    queries: slice
    keys: slice
    causal: bool = False
    mask_of: tuple[range, range] | None = None
    """Positions in the row of these queries and keys, where a mask is needed."""


@dataclass(frozen=True, kw_only=True)
class RingPlan:
    """What all layers of one forward pass share. `pieces[i]` are those of rank i's block."""

    pieces: tuple[tuple[Piece, ...], ...]
    documents_BS: Tensor | None
    """Of whole rows, in true order."""
    window: int | None

    def mask(self, piece: Piece, device: torch.device) -> Tensor | None:
        """Made anew for each use: kept, masks would grow with the square of the row."""
        if piece.mask_of is None:
            return None
        queries, keys = piece.mask_of
        return visible(queries, keys, documents_BS=self.documents_BS, window=self.window, device=device)


class RingAttention:
    """An `AttentionCore` for rows whose tokens lie zig-zag over `axis`. Memory is linear in the row: q, k, v, out, lse.

    Every rank of the axis calls `prepare` and `__call__`, and runs the backward, in the same order. With e bytes an
    element and P = B G S (width of k + width of v) elements of a rank's keys and values (S = row / cp):

    - `prepare`: with documents one all-gather of 4 B S bytes a rank (int32 ids), else nothing;
    - forward: cp - 1 messages sent (and received) per rank, e P bytes each: keys and values, to the next rank;
    - backward: 2 (cp - 1) messages sent per rank: keys and values again, e P bytes each, and their gradients, which travel
      with their block until they are home, max(e, 4) P bytes each, summed in float32.

    Each transfer of keys and values runs beside the compute on the block before it, each one of gradients beside the
    compute on the block after.
    """

    def __init__(self, axis: Axis, window: int | None = None) -> None:
        self.axis = axis
        self.window = window

    @torch.compiler.disable
    def prepare(
        self, document_ids_BS: Tensor | None, num_queries: int, num_keys: int, device: torch.device
    ) -> RingPlan:
        """From this rank's document ids (B, S), or None; `num_queries` = `num_keys` = S, this rank's tokens of a row."""
        assert num_queries == num_keys, "context parallelism has no cache of keys"
        documents_BS = gather_documents(document_ids_BS, self.axis)
        length = chunk_length(num_queries * self.axis.size, self.axis.size)
        masked = documents_BS is not None or self.window is not None
        pieces = [
            tuple(_masked_pieces(self.axis, source, length, self.window, documents_BS is not None))
            if masked
            else (_plain_piece(self.axis.rank, source, length),)
            for source in range(self.axis.size)
        ]
        return RingPlan(pieces=tuple(pieces), documents_BS=documents_BS, window=self.window)

    @torch.compiler.disable
    def __call__(self, q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, prepared: RingPlan) -> Tensor:
        """Causal attention within each document (and window), over whole rows; returns (B, H, S, width of v)."""
        result: Tensor = _Ring.apply(q_BHSD, k_BGSD, v_BGSD, self.axis, prepared)
        return result


def _plain_piece(rank: int, source: int, length: int) -> Piece:
    """Without documents and window: one piece a block, half of all pairs, fully visible but for a rank's own block.

    Rank r's chunks are r and 2 cp - 1 - r. Of an earlier rank's chunks both see the first only, of a later rank's chunks
    the second sees both and the first none. A rank's own chunks, in their order, are a causal square.
    """
    whole = slice(0, 2 * length)
    if source == rank:
        return Piece(queries=whole, keys=whole, causal=True)
    if source < rank:
        return Piece(queries=whole, keys=slice(0, length))
    return Piece(queries=slice(length, 2 * length), keys=whole)


def _masked_pieces(axis: Axis, source: int, length: int, window: int | None, documents: bool) -> Iterator[Piece]:
    """Pieces of at most `_TILE` queries, each with the keys of one chunk from the first to the last that any of them sees."""
    for at, chunk in enumerate(chunks_of(axis.rank, axis.size)):
        for first in range(0, length, _TILE):
            queries = range(chunk * length + first, chunk * length + min(first + _TILE, length))
            for key_at, key_chunk in enumerate(chunks_of(source, axis.size)):
                oldest = 0 if window is None else queries.start - window + 1
                keys = range(max(key_chunk * length, oldest), min((key_chunk + 1) * length, queries.stop))
                if not keys:
                    continue
                in_window = window is None or queries.stop - 1 - keys.start < window
                all_visible = not documents and in_window and keys.stop - 1 <= queries.start
                start, key_start = at * length + first, key_at * length + keys.start - key_chunk * length
                yield Piece(
                    queries=slice(start, start + len(queries)),
                    keys=slice(key_start, key_start + len(keys)),
                    mask_of=None if all_visible else (queries, keys),
                )


@dataclass(frozen=True, kw_only=True)
class _Transfer:
    """A block on its way: `sent` to the next rank, while the previous rank's comes in."""

    sent_N: Tensor
    incoming_N: Tensor
    works: tuple[Any, ...]

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.incoming_N


def _pass_on(block_N: Tensor, axis: Axis) -> _Transfer:
    """Starts the step of the ring: every rank of the axis sends to the next one and receives from the previous."""
    incoming_N = torch.empty_like(block_N)
    following, previous = axis.ranks[(axis.rank + 1) % axis.size], axis.ranks[axis.rank - 1]
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, block_N, following, axis.group),
            dist.P2POp(dist.irecv, incoming_N, previous, axis.group),
        ]
    )
    return _Transfer(sent_N=block_N, incoming_N=incoming_N, works=tuple(works))


def _pack(k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
    """Keys and values as one message."""
    return torch.cat((k_BGSD.reshape(-1), v_BGSD.reshape(-1)))


def _unpack(block_N: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a message, of the shapes of keys and values."""
    k_N, v_N = block_N.split((k_BGSD.numel(), v_BGSD.numel()))
    return k_N.view(k_BGSD.shape), v_N.view(v_BGSD.shape)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, axis: Axis, plan: RingPlan) -> Tensor:
        ctx.axis, ctx.plan = axis, plan
        dtype = accumulator_dtype(q.dtype)
        total = BlockOutput(
            out_BHQD=q.new_zeros((*q.shape[:3], v.shape[-1]), dtype=dtype),
            lse_BHQ=q.new_full(q.shape[:3], float("-inf"), dtype=dtype),
        )
        block_N = _pack(k, v)
        for step in range(axis.size):
            transfer = _pass_on(block_N, axis) if step < axis.size - 1 else None
            block_k, block_v = _unpack(block_N, k, v)
            for piece in plan.pieces[(axis.rank - step) % axis.size]:
                mask = plan.mask(piece, q.device)
                keys = block_k[:, :, piece.keys], block_v[:, :, piece.keys]
                part = attend(q[:, :, piece.queries], *keys, causal=piece.causal, mask=mask)
                merge_into(_rows(total, piece.queries), part)
            if transfer is not None:
                block_N = transfer.wait()
        out = total.out_BHQD.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, total.lse_BHQ)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        axis, dtype = ctx.axis, accumulator_dtype(q.dtype)
        merged = BlockOutput(out_BHQD=out, lse_BHQ=lse)
        dq = torch.zeros_like(q, dtype=dtype)
        block_N = _pack(k, v)
        home_N, returning = None, None
        for step in range(axis.size):
            transfer = _pass_on(block_N, axis) if step < axis.size - 1 else None
            pieces = ctx.plan.pieces[(axis.rank - step) % axis.size]
            dblock_N = torch.zeros_like(block_N, dtype=dtype)
            _add_gradients(dq, _unpack(dblock_N, k, v), grad_out, q, _unpack(block_N, k, v), merged, ctx.plan, pieces)
            if step == 0:
                home_N = dblock_N  # stays, while the block goes round; what the others add to it comes at the end
            else:
                returning = _pass_on(dblock_N if returning is None else dblock_N.add_(returning.wait()), axis)
            if transfer is not None:
                block_N = transfer.wait()
        assert home_N is not None
        if returning is not None:
            home_N.add_(returning.wait())
        dk, dv = _unpack(home_N, k, v)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _rows(output: BlockOutput, queries: slice) -> BlockOutput:
    return BlockOutput(out_BHQD=output.out_BHQD[:, :, queries], lse_BHQ=output.lse_BHQ[:, :, queries])


def _add_gradients(
    dq: Tensor,
    dblock: tuple[Tensor, Tensor],
    grad_out: Tensor,
    q: Tensor,
    block: tuple[Tensor, Tensor],
    merged: BlockOutput,
    plan: RingPlan,
    pieces: tuple[Piece, ...],
) -> None:
    """Adds what one visiting block's pieces contribute to the gradients of queries (`dq`) and of the block (`dblock`)."""
    (block_k, block_v), (dk, dv) = block, dblock
    for piece in pieces:
        gradients = attend_backward(
            grad_out[:, :, piece.queries],
            q[:, :, piece.queries],
            block_k[:, :, piece.keys],
            block_v[:, :, piece.keys],
            _rows(merged, piece.queries),
            causal=piece.causal,
            mask=plan.mask(piece, q.device),
        )
        dq[:, :, piece.queries] += gradients.q_BHQD
        dk[:, :, piece.keys] += gradients.k_BGKD
        dv[:, :, piece.keys] += gradients.v_BGKD
