"""A state as checkpoints see it: flat, each tensor a `Piece` of a whole, all else an object."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from parallel.placement import Piece, piece_of

FlatState = dict[str, Any]


class Box(NamedTuple):
    """One part of one entry: where it begins in the whole, and its sizes. An object is one box without dims."""

    key: str
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


def flatten(state: Mapping[str, Any]) -> FlatState:
    """Nested mappings as one dict; keys are joined by dots, leaves (all that is no mapping) stay as they are."""
    flat: FlatState = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix else str(key), inner)
        elif prefix in flat:
            raise ValueError(f"two entries of the state are called {prefix!r}")
        else:
            flat[prefix] = value

    visit("", state)
    return flat


def nested_like(state: Mapping[str, Any], flat: FlatState, prefix: str = "") -> dict[str, Any]:
    """The nesting of `state` with the values of `flat`, and its own where `flat` has none."""
    nested: dict[str, Any] = {}
    for key, value in state.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        nested[key] = nested_like(value, flat, name) if isinstance(value, Mapping) else flat.get(name, value)
    return nested


def in_pieces(flat: FlatState) -> FlatState:
    """`flat` with a piece in the place of each tensor: a plain one is a whole, a DTensor a shard. Shares memory."""
    return {key: piece_of(value) if isinstance(value, torch.Tensor) else value for key, value in flat.items()}


def box_of(key: str, value: Any) -> Box | None:
    """What of an entry (a piece or an object) this rank holds. None for an empty piece of a tensor that is not empty."""
    if not isinstance(value, Piece):
        return Box(key)
    if math.prod(value.shape) == 0:  # somebody must hold it, or its name would be lost
        return Box(key, (0,) * len(value.shape), tuple(value.shape))
    return Box(key, value.offsets, tuple(value.local.shape)) if value.local.numel() else None
