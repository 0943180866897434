"""Who competes for a slow uplink: found by leaving out one flow at a time."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.fabric.stages.competitors import competitors
from tests.cluster.fabric.stages.cables import HOST_RATE, Cables, congested


def said_of(fabric: Cables, *, standing: bool = False, seed: int = 0) -> dict[str, Any]:
    """Evidence."""
    session, item = congested(fabric, seed=seed)
    return competitors(session, item, standing=standing)


def senders(evidence: dict[str, Any]) -> set[str]:
    """Of the flows that are named."""
    return {sender for sender, _ in evidence["competing_flows"]}


@pytest.mark.parametrize("seed", range(5))
def test_the_flows_that_share_a_full_cable_are_named_and_no_others(seed: int) -> None:
    fabric = Cables({frozenset({1, 2}): HOST_RATE, frozenset({0, 3}): 2 * HOST_RATE})
    evidence = said_of(fabric, seed=seed)
    assert evidence["competitors"] == "own"
    assert senders(evidence) == {"h1", "h2"}
    assert all(receiver in {"h4", "h5", "h6", "h7"} for _, receiver in evidence["competing_flows"])
    for sender, receiver in evidence["competing_flows"]:
        assert f"{sender} to {receiver}" in evidence["competitors_in_words"]


def test_strangers_are_meant_where_leaving_out_own_flows_frees_nothing_and_one_alone_is_slow() -> None:
    fabric = Cables({frozenset({number}): 0.4 * HOST_RATE for number in range(4)})
    evidence = said_of(fabric)
    assert (evidence["competitors"], evidence["competing_flows"]) == ("foreign", [])
    assert evidence["alone_bytes_per_s"] == pytest.approx(0.4 * HOST_RATE, rel=0.1)
    assert "a flow alone is slow too" in evidence["competitors_in_words"]
    assert "frees nothing" in evidence["competitors_in_words"]


def test_a_queue_without_own_flows_is_strangers_and_own_flows_share_what_those_leave() -> None:
    evidence = said_of(Cables({frozenset(range(4)): 2 * HOST_RATE}), standing=True)
    assert evidence["competitors"] == "foreign and own"
    assert senders(evidence) == {"h0", "h1", "h2", "h3"}
    assert evidence["competitors_in_words"].startswith("foreign traffic competes (packets queue")


def test_one_slow_flow_of_several_does_not_make_a_lone_flow_slow() -> None:
    for seed in range(8):
        fabric = Cables({frozenset({0}): 0.4 * HOST_RATE, frozenset({1, 2, 3}): 1.5 * HOST_RATE})
        assert said_of(fabric, seed=seed)["competitors"] == "own", seed


def test_of_many_flows_neighbours_are_left_out_together() -> None:
    fabric = Cables({frozenset(range(16)): 8 * HOST_RATE}, hosts=32, transfer_s=0.05)
    evidence = said_of(fabric)
    assert len(evidence["competing_flows"]) == 16
    assert len(fabric.asked) <= 1 + 3 * (8 + 2)


def test_it_ends_in_time_however_slow_the_transfers_are() -> None:
    fabric = Cables({frozenset(range(4)): 2 * HOST_RATE}, transfer_s=1.0)
    fabric.seconds = 13.0
    evidence = said_of(fabric)
    assert fabric.seconds <= 0.8 * 18 + 2.0
    assert evidence["competitors"] == "own"
    late = Cables({frozenset(range(4)): 2 * HOST_RATE}, transfer_s=1.0)
    late.seconds = 18.0
    assert said_of(late)["competing_flows"] == []
    assert len(late.asked) == 2
