"""Whether what a run asks for is what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from parallel.checkpoint.pieces import FlatState
from parallel.placement import Piece


@dataclass(frozen=True, kw_only=True)
class SavedTensor:
    """A tensor of a checkpoint: its global shape and its type."""

    shape: torch.Size
    dtype: torch.dtype


def differences(wanted: FlatState, saved: Mapping[str, SavedTensor | None]) -> list[str]:
    """Where the entries asked for (pieces and objects) are not those of a checkpoint: a piece by its whole shape."""
    lacking = sorted(key for key in wanted if key not in saved)
    problems = [f"it lacks {some_of(lacking)}"] if lacking else []
    for key, value in wanted.items():
        if key not in saved:
            continue
        here = SavedTensor(shape=value.shape, dtype=value.local.dtype) if isinstance(value, Piece) else None
        if here != saved[key]:
            problems.append(f"{key} is {_describe(saved[key])} there and {_describe(here)} here")
    return problems if len(problems) <= 4 else [*problems[:3], f"and {len(problems) - 3} more differences"]


def _describe(entry: SavedTensor | None) -> str:
    return "no tensor" if entry is None else f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"


def some_of(keys: Sequence[str]) -> str:
    """The first names of many, for a message."""
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
