"""Counters at one moment, and by how much they grew between two moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_WRAP = 2**32


@dataclass(frozen=True, kw_only=True)
class Count:
    """One counter as the system keeps it."""

    value: int
    """In the counter's own steps: bytes, packets, words of 4 bytes, microseconds."""
    unit: float = 1.0
    """What one step is worth in the unit that the counter's name ends in (`_bytes`, `_s`); 1 for what is counted."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All counters of a host at one moment. Names are `area/device/name`, such as `infiniband/mlx5_0:1/port_xmit_wait`."""

    counts: Mapping[str, Count]
    """What only grows until it wraps or is cleared."""
    states: Mapping[str, float]
    """What holds at that moment: 1 for a port that is down or a clock that is held back, 0 where it is not; rates."""


def growth(before: Snapshot, after: Snapshot) -> dict[str, float]:
    """By how much each counter grew, in the unit of its name; states as they are `after`, 1 where either moment had it.

    A counter that `before` lacks is left out: how far it had come by then is not known.
    """
    grown: dict[str, float] = {}
    for name, count in after.counts.items():
        if earlier := before.counts.get(name):
            grown[name] = _steps(earlier.value, count.value) * count.unit
    for name, state in after.states.items():
        was_on = before.states.get(name) == 1.0
        grown[name] = 1.0 if was_on and state == 0.0 else state
    return grown


def _steps(before: int, after: int) -> int:
    """A counter that fell has wrapped at 32 bits where it was in their upper half, else it was cleared meanwhile."""
    if after >= before:
        return after - before
    return after + _WRAP - before if _WRAP // 2 <= before < _WRAP else after
