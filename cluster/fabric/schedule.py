"""Who sends to whom in which round. Pure numpy.

A schedule of all pairs is a list of rounds; a round is a set of disjoint pairs, (P, 2), the lower index first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cluster.fabric.probing import Flows

Pairs = NDArray[np.intp]
"""(P, 2): no endpoint is in two of them."""


def circle_rounds(count: int) -> list[Pairs]:
    """All pairs of `count` endpoints in count - 1 rounds (count rounds, one endpoint idle in each, where it is odd).

    Source: the circle method, Kirkman (1847), On a problem in combinations.
    """
    seats = count + count % 2
    ring = np.arange(seats)
    rounds = []
    for _ in range(seats - 1):
        pairs = np.stack([ring[: seats // 2], ring[: seats // 2 - 1 : -1]], axis=1)
        rounds.append(np.sort(pairs[(pairs < count).all(axis=1)], axis=1))
        ring = np.concatenate([ring[:1], np.roll(ring[1:], 1)])
    return rounds


def halving_rounds(count: int) -> list[Pairs]:
    """All pairs, first those between the halves, then those within each, and so on: count - 1 rounds for a power of two.

    A round's pairs all cross the same boundary, so that an uplink between neighbouring hosts bears all of them or none.
    """
    if count < 2:
        return []
    low, high = count // 2, count - count // 2
    rounds = []
    for shift in range(high):
        partner = low + (np.arange(low) + shift) % high
        rounds.append(np.stack([np.arange(low), partner], axis=1))
    below, above = halving_rounds(low), halving_rounds(high)
    for index in range(max(len(below), len(above))):
        parts = [half[index] + offset for half, offset in ((below, 0), (above, low)) if index < len(half)]
        rounds.append(np.concatenate(parts))
    return rounds


def both_ways(pairs: Pairs) -> Flows:
    """(2P, 2) flows: each pair there, then each back."""
    return np.concatenate([pairs, pairs[:, ::-1]])


def renamed(rounds: Sequence[Pairs], order: Sequence[int] | NDArray[np.intp]) -> list[Pairs]:
    """The same rounds with endpoint i played by `order[i]`."""
    names = np.asarray(order, dtype=np.intp)
    return [np.sort(names[pairs], axis=1) for pairs in rounds]


def random_pairs(members: Sequence[int] | NDArray[np.intp], rng: np.random.Generator) -> Pairs:
    """Disjoint pairs of all `members` (one is left out where their number is odd), each in a random direction."""
    order = rng.permutation(np.asarray(members, dtype=np.intp))
    return order[: order.size - order.size % 2].reshape(-1, 2)
