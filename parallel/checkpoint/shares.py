"""Who writes what of a checkpoint.

Several ranks may hold the same box of a tensor: every one under DDP, the neighbours that share a key's head under tensor
parallelism, the first and last stage of a pipeline with a tied embedding. Each box is written once, by one of them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from parallel.checkpoint.pieces import Box, FlatState, box_of
from parallel.errors import CheckpointError
from parallel.placement import Piece
from parallel.world import World

_ENVELOPE_BYTES = 1500
"""About what each box costs in a file beyond its own bytes. So small ones are shared out evenly too."""


class Claim(NamedTuple):
    """What a rank says of a box that it holds: its bytes, and the shape and type of the whole (None: an object)."""

    num_bytes: int = 0
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None


class WriteShares:
    """Decides, alike on all ranks, which of them writes a box that more than one holds."""

    def __init__(self) -> None:
        self._signature: int | None = None
        self._mine: frozenset[Box] = frozenset()

    def mine(self, state: FlatState, world: World) -> FlatState:
        """The entries of `state` (pieces and objects) that this rank writes: boxes that it alone holds, and about 1/N
        of what N ranks hold.

        A collective over the world. Boxes are exchanged only when some rank's differ from those at the last save; then
        `CheckpointError` on all ranks names what they do not hold all of, or disagree about.
        """
        held = {box: _claim(value) for key, value in state.items() if (box := box_of(key, value)) is not None}
        signature = zlib.crc32(repr(sorted(held.items(), key=lambda entry: entry[0])).encode())
        if any(world.all_gather_object(signature != self._signature)):
            everywhere = world.all_gather_object(held)
            refuse_gaps(everywhere)
            self._mine = frozenset(assign_writers(everywhere)[world.rank])
            self._signature = signature
        return {box.key: state[box.key] for box in held if box in self._mine}


def assign_writers(held: Sequence[dict[Box, Claim]]) -> list[set[Box]]:
    """For each rank the boxes that it writes, of those that it holds.

    Each box gets one writer: those with the fewest holders first, since there is the least choice, then the largest,
    each to the least burdened.
    """
    holders: dict[Box, list[int]] = {}
    for rank, boxes in enumerate(held):
        for box in boxes:
            holders.setdefault(box, []).append(rank)
    burden = [0] * len(held)
    shares: list[set[Box]] = [set() for _ in held]
    for box, ranks in sorted(holders.items(), key=lambda e: (len(e[1]), -held[e[1][0]][e[0]].num_bytes, e[0])):
        writer = min(ranks, key=lambda rank: (burden[rank], rank))
        burden[writer] += held[writer][box].num_bytes + _ENVELOPE_BYTES
        shares[writer].add(box)
    return shares


def refuse_gaps(held: Iterable[dict[Box, Claim]]) -> None:
    """Raises `CheckpointError` unless the ranks agree on every entry and their boxes make up the whole of it."""
    boxes: dict[str, set[Box]] = {}
    kinds: dict[str, set[tuple[tuple[int, ...] | None, torch.dtype | None]]] = {}
    for claims in held:
        for box, claim in claims.items():
            boxes.setdefault(box.key, set()).add(box)
            kinds.setdefault(box.key, set()).add((claim.shape, claim.dtype))
    problems = []
    for key in sorted(boxes):
        shape, _ = next(iter(kinds[key]))
        if len(kinds[key]) > 1:
            problems.append(f"{key} has not the same shape and type on all ranks")
        elif shape is not None and (held_numel := sum(math.prod(box.sizes) for box in boxes[key])) != math.prod(shape):
            what = "its parts overlap," if held_numel > math.prod(shape) else "the ranks hold"
            problems.append(f"{key} {list(shape)}: {what} {held_numel} of {math.prod(shape)} elements")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"a checkpoint was not saved: {'; '.join(problems[:3])}{more}. The placements of this layout are wrong, "
            "which is a mistake of the program: train under another layout, and report this one"
        )


def _claim(value: object) -> Claim:
    if not isinstance(value, Piece):
        return Claim()
    local = value.local
    return Claim(num_bytes=local.numel() * local.element_size(), shape=tuple(value.shape), dtype=local.dtype)
