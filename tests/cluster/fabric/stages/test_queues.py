"""Round trips through a slow part while the own flows rest."""

from __future__ import annotations

import pytest

from cluster.fabric.analysis.explain import Part, sender
from cluster.fabric.stages.queues import standing_queue
from tests.cluster.fabric.stages.cables import Cables, congested, halves


@pytest.mark.parametrize("seed", range(5))
def test_every_repeat_asks_another_peer_of_a_suspect_host(seed: int) -> None:
    peers = asked_through(sender(3, 8), seed)
    assert len(peers) == 4
    assert len(set(peers)) == 4


@pytest.mark.parametrize("seed", range(5))
def test_every_repeat_crosses_an_uplink_by_other_pairs(seed: int) -> None:
    pairs = asked_through(halves(8), seed)
    assert len(pairs) == 8
    assert len(set(pairs)) == 8


def asked_through(part: Part, seed: int) -> list[tuple[int, int]]:
    """Pairs that passed `part`, of all repeats."""
    fabric = Cables({})
    session, _ = congested(fabric, seed=seed)
    queue = standing_queue(session, part, [])
    assert queue is not None
    assert not queue.standing
    return [(a, b) for pairs in fabric.asked for a, b in pairs if a in part.senders and b in part.receivers]
