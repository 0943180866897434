"""Who sends to whom where there are many leaves: neighbours under one leaf, and shifts from leaf to leaf. Pure numpy.

Within a leaf disjoint pairs share nothing. Between leaves they may: where spines are chosen by tables (InfiniBand), hosts that
hold the same position under different leaves reach one another without sharing a cable (Zahavi 2012, Fat-tree routing and node
ordering providing contention free traffic); where a hash chooses, any two flows may meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.fabric.probing import Endpoint, Flows

Indices = NDArray[np.intp]
Mask = NDArray[np.bool_]
_LEAST_LEAVES, _LEAST_SIZE = 3, 4
"""Physics: with two leaves an uplink of one is that of the other; leaves of fewer endpoints have no pairs to compare with."""
NO_FLOWS: Flows = np.zeros((0, 2), dtype=np.intp)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Endpoints by leaf. Where leaves are not known, all are taken to be under one."""

    leaf_of: Indices
    """(n,) number of each endpoint's leaf."""
    members: tuple[Indices, ...]
    """Endpoints of each leaf, by position."""
    host_of: Indices
    """(n,) number of each endpoint's host: two of one host reach one another without the network."""

    @property
    def num_leaves(self) -> int:
        """One where leaves are not known."""
        return len(self.members)

    @property
    def leaf_size(self) -> int:
        """Endpoints under the median leaf."""
        return int(np.median([len(members) for members in self.members]))

    def neighbours(self, shift: int) -> Flows:
        """Each endpoint sends to the one `shift` positions further under its leaf; it receives from one as well."""
        rings = [members for members in self.members if len(members) > 1]
        return _joined([np.stack([ring, np.roll(ring, -(shift % len(ring) or 1))], axis=1) for ring in rings])

    def across(self, shift: int, *, most: int | None, rng: np.random.Generator) -> Flows:
        """Position by position from each leaf to the one `shift` further on; `most` flows a leaf, drawn by chance."""
        parts = []
        for number, senders in enumerate(self.members):
            receivers = self.members[(number + shift) % self.num_leaves]
            positions = np.arange(min(len(senders), len(receivers)))
            if most is not None:
                positions = np.sort(rng.permutation(positions)[:most])
            parts.append(np.stack([senders[positions], receivers[positions]], axis=1))
        flows = _joined(parts)
        return flows[self.host_of[flows[:, 0]] != self.host_of[flows[:, 1]]]

    def repairs(self, suspects: Indices, good: Mask, shift: int) -> Flows:
        """Each suspect sends to, and receives from, a good endpoint under its leaf; another one for another `shift`.

        Suspects for which no good endpoint is left are left out.
        """
        parts = []
        for number in np.unique(self.leaf_of[suspects]):
            here = suspects[self.leaf_of[suspects] == number]
            partners = self.members[number][good[self.members[number]]]
            count = min(len(here), len(partners))
            if count:
                partners = np.roll(partners, -shift)[:count]
                parts += [np.stack([here[:count], partners], axis=1), np.stack([partners, here[:count]], axis=1)]
        return _joined(parts)


def layout_of(endpoints: Sequence[Endpoint]) -> Layout:
    """Leaves in the order of their rail and of their first endpoint: neighbouring leaves have neighbouring numbers."""
    host_of = np.unique([endpoint.host for endpoint in endpoints], return_inverse=True)[1]
    if any(endpoint.leaf is None for endpoint in endpoints):
        alone = np.zeros(len(endpoints), dtype=np.intp)
        return Layout(leaf_of=alone, members=(np.arange(len(endpoints)),), host_of=host_of)
    first: dict[tuple[int, str | None], int] = {}
    for endpoint in endpoints:
        first.setdefault((endpoint.rail, endpoint.leaf), len(first))
    order = {leaf: number for number, (_, leaf) in enumerate(sorted(first, key=lambda key: (key[0], first[key])))}
    leaf_of = np.array([order[endpoint.leaf] for endpoint in endpoints], dtype=np.intp)
    ends = np.cumsum(np.bincount(leaf_of))[:-1]
    members = tuple(np.split(np.argsort(leaf_of, kind="stable"), ends))
    return Layout(leaf_of=leaf_of, members=members, host_of=host_of)


def has_many_leaves(endpoints: Sequence[Endpoint]) -> bool:
    """Whether leaves are known, and there are enough of enough endpoints to tell them apart by rounds within and across.

    Between so many leaves flows may share cables by chance, which a matrix of all pairs takes for faults.
    """
    layout = layout_of(endpoints)
    return layout.num_leaves >= _LEAST_LEAVES and layout.leaf_size >= _LEAST_SIZE


def pairs_for(open_ends: Mask, count: int, rng: np.random.Generator) -> Flows:
    """`count` disjoint flows: half of them from senders, half to receivers that are still open; the other ends are not.

    open_ends: (2, n) of senders and receivers. While too few are settled, or open, others take their place.
    """
    flows: list[tuple[int, int]] = []
    busy: tuple[set[int], set[int]] = (set(), set())
    for side in (0, 1):
        wanted, others = (_open_first(open_ends[end], end == side, rng) for end in (side, 1 - side))
        free = iter([end for end in others if end not in busy[1 - side]])
        for end in [end for end in wanted if end not in busy[side]][: count // 2]:
            other = next((other for other in free if other != end), None)
            if other is None:
                break
            flows.append((end, other) if side == 0 else (other, end))
            busy[0].add(flows[-1][0])
            busy[1].add(flows[-1][1])
    return np.array(flows, dtype=np.intp).reshape(-1, 2)


def _open_first(open_ends: Mask, first: bool, rng: np.random.Generator) -> list[int]:
    order = rng.permutation(len(open_ends))
    return [int(end) for end in order[np.argsort(open_ends[order] != first, kind="stable")]]


def without(flows: Flows, taken: Flows, good: Mask | None = None) -> Flows:
    """Flows that share neither sender nor receiver with those `taken`; only between `good` endpoints where that is given."""
    most = max(flows.max(initial=0), taken.max(initial=0)) + 1
    sends, receives = np.zeros(most, dtype=bool), np.zeros(most, dtype=bool)
    sends[taken[:, 0]] = receives[taken[:, 1]] = True
    free = ~sends[flows[:, 0]] & ~receives[flows[:, 1]]
    return flows[free if good is None else free & good[flows].all(axis=1)]


def _joined(parts: Sequence[Flows]) -> Flows:
    return np.concatenate([NO_FLOWS, *parts])
