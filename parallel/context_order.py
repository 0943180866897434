"""Zig-zag order: which positions of a row each rank of the context axis holds, and which of them see one another.

A row of S tokens is 2 * cp chunks; rank r holds chunks r and 2 * cp - 1 - r, in this order. Under a causal mask each rank
then has the same work, since what an early chunk lacks in keys its late one has in excess.

Shape suffixes: B batch, S sequence (the whole row, or this rank's part), Q queries, K keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel import collectives
from parallel.mesh import Axis


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The two chunks of a row that a rank of an axis of `size` holds, in its order."""
    return rank, 2 * size - 1 - rank


def chunk_length(seq_len: int, size: int) -> int:
    """Tokens in a chunk of a row of `seq_len` tokens, which 2 * size divides."""
    assert seq_len % (2 * size) == 0, f"a row of {seq_len} tokens does not fall into {2 * size} equal chunks"
    return seq_len // (2 * size)


def zigzag_positions(seq_len: int, axis: Axis) -> Tensor:
    """This rank's positions in a row of `seq_len` tokens, in its order: (seq_len / cp,), int64, on the CPU."""
    length = chunk_length(seq_len, axis.size)
    return torch.cat([torch.arange(c * length, (c + 1) * length) for c in chunks_of(axis.rank, axis.size)])


def zigzag_cut(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part of a tensor with all positions of a row along `dim`. No communication."""
    if not axis.is_split:
        return x
    chunk_length(x.shape[dim], axis.size)
    chunks = x.chunk(2 * axis.size, dim=dim)
    return torch.cat([chunks[c] for c in chunks_of(axis.rank, axis.size)], dim=dim)


def true_order(size: int) -> list[int]:
    """Where, in the parts of all ranks side by side, the chunks of a row lie from its first to its last."""
    held = [chunk for rank in range(size) for chunk in chunks_of(rank, size)]
    return [held.index(chunk) for chunk in range(2 * size)]


def zigzag_join(parts: list[Tensor], dim: int) -> Tensor:
    """The inverse of `zigzag_cut`: all ranks' parts, in the order of the axis, as whole rows."""
    if len(parts) == 1:
        return parts[0]
    chunks = [chunk for part in parts for chunk in part.chunk(2, dim=dim)]
    return torch.cat([chunks[at] for at in true_order(len(parts))], dim=dim)


def gather_rows(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Whole rows, in true order along `dim`, from every rank's part. One all-gather; backward: one reduce-scatter.

    Every rank of the axis calls it, in forward and in backward.
    """
    if not axis.is_split:
        return x
    halves = torch.stack(x.chunk(2, dim=dim))
    chunks = collectives.all_gather(halves, axis, dim=0).unbind(0)
    return torch.cat([chunks[at] for at in true_order(axis.size)], dim=dim)


@torch.no_grad()
def gather_documents(document_ids_BS: Tensor | None, axis: Axis) -> Tensor | None:
    """The document ids of whole rows in true order: one all-gather over the axis, of 4 B S / cp bytes a
    rank (int32 ids); or None.

    Every rank of the axis calls it.
    """
    return None if document_ids_BS is None else gather_rows(document_ids_BS, axis, dim=1)


def visible(
    queries: range, keys: range, *, documents_BS: Tensor | None, window: int | None, device: torch.device
) -> Tensor:
    """Which keys each query sees: (B or 1, 1, Q, K), true = visible. `documents_BS` are those of whole rows.

    A query at p sees the keys at p and before in its own document, and with a window only those after p - window.
    """
    query_Q = torch.arange(queries.start, queries.stop, device=device)
    key_K = torch.arange(keys.start, keys.stop, device=device)
    distance_QK = query_Q[:, None] - key_K
    mask_BQK = (distance_QK >= 0)[None]
    if window is not None:
        mask_BQK = mask_BQK & (distance_QK < window)
    if documents_BS is not None:
        q_BQ, k_BK = documents_BS[:, queries.start : queries.stop], documents_BS[:, keys.start : keys.stop]
        mask_BQK = mask_BQK & (q_BQ[:, :, None] == k_BK[:, None, :])
    return mask_BQK[:, None]
