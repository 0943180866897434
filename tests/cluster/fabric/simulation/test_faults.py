"""Faults that are drawn, and which findings name them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from cluster.fabric.findings import Finding, Kind
from cluster.fabric.simulation.faults import HEALTHY, INJECTIONS, Fault, Injection, draw_fault, draw_two_faults
from cluster.fabric.simulation.topology import Topology, fat_tree, two_leaves

FAULTS: list[Injection] = [injection for injection in INJECTIONS if injection != "none"]


def _finding(kind: Kind, hosts: Sequence[int]) -> Finding:
    return Finding(
        kind=kind,
        hosts=tuple(f"h{host}" for host in hosts),
        ranks=tuple(hosts),
        confidence=0.9,
        evidence={},
        sentence="",
    )


def _draws(injection: Injection, topology: Topology, count: int = 60) -> list[Fault]:
    return [draw_fault(np.random.default_rng(seed), injection, topology) for seed in range(count)]


@pytest.mark.parametrize("injection", FAULTS)
@pytest.mark.parametrize("topology", [two_leaves(), fat_tree(1024)], ids=["two-leaves", "fat-tree"])
def test_draws_are_severe_enough_and_repeat(injection: Injection, topology: Topology) -> None:
    faults = _draws(injection, topology)
    assert faults == _draws(injection, topology)
    assert len({fault.endpoint for fault in faults}) > 5
    least = {"slow_host": 0.9, "missing_rank": 0.0}.get(injection, 0.8)
    assert all(fault.keep <= least for fault in faults)


def test_slow_ends_touch_the_links_of_their_direction() -> None:
    topology = two_leaves()
    for fault in _draws("slow_sender", topology):
        assert [link.link for link in fault.links] == [topology.out_of(fault.endpoint)]
    for fault in _draws("slow_receiver", topology):
        assert [link.link for link in fault.links] == [topology.into(fault.endpoint)]
    assert all(len(fault.links) == 2 for fault in _draws("slow_link", topology))


def test_congestion_and_incast_keep_queues_and_vary() -> None:
    for fault in _draws("congested_uplink", fat_tree(1024)) + _draws("incast", two_leaves()):
        assert all(link.queue_round_trips > 0 and link.varies > 0 for link in fault.links)
    assert {len(fault.links) for fault in _draws("congested_uplink", fat_tree(1024))} == {32, 64}


def test_loss_is_expected_where_it_happens() -> None:
    topology = two_leaves()
    expected = {(fault.expected, fault.links[0].link >= 8) for fault in _draws("packet_loss", topology)}
    assert expected == {("slow_sender", False), ("slow_receiver", True)}


def test_a_host_is_named_by_kind_and_host_alone() -> None:
    topology = two_leaves()
    fault = _draws("slow_sender", topology)[0]
    assert fault.recognised(_finding("slow_sender", [fault.endpoint]), topology)
    assert not fault.recognised(_finding("slow_receiver", [fault.endpoint]), topology)
    assert not fault.recognised(_finding("slow_sender", [(fault.endpoint + 1) % 8]), topology)
    assert not fault.recognised(_finding("slow_sender", [fault.endpoint, (fault.endpoint + 1) % 8]), topology)


def test_a_pair_is_named_in_its_direction() -> None:
    topology = two_leaves()
    fault = next(fault for fault in _draws("bad_path", topology) if len(fault.pairs) == 1)
    sender, receiver = fault.pairs[0]
    assert fault.recognised(_finding("bad_path", [sender, receiver]), topology)
    assert not fault.recognised(_finding("bad_path", [receiver, sender]), topology)
    assert not fault.recognised(_finding("bad_path", [sender]), topology)


def test_a_cable_is_named_by_any_pair_whose_traffic_crosses_it() -> None:
    topology = fat_tree(1024)
    fault = _draws("bad_path", topology)[0]
    bad = {link.link for link in fault.links}
    pairs = np.stack([np.full(1024, fault.endpoint), np.arange(1024)], axis=1)
    pairs = np.concatenate([pairs, pairs[:, ::-1]])
    crossing = [bool(bad & set(route)) for route in topology.routes(pairs).tolist()]
    named = [fault.recognised(_finding("bad_path", pair), topology) for pair in pairs.tolist()]
    assert named == crossing
    assert 0 < sum(crossing) < 200


def test_an_uplink_is_named_by_all_hosts_of_its_leaf() -> None:
    topology = fat_tree(1024)
    fault = _draws("congested_uplink", topology)[0]
    first = fault.endpoint // 32 * 32
    assert fault.recognised(_finding("congested_uplink", range(first, first + 32)), topology)
    assert not fault.recognised(_finding("congested_uplink", range(first, first + 31)), topology)
    assert not fault.recognised(_finding("congested_uplink", range(1024)), topology)


def test_a_network_card_is_named_with_its_rail() -> None:
    topology = fat_tree(64, rails=8)
    for injection, any_rail in (("slow_sender", False), ("slow_host", True)):
        fault = _draws(injection, topology)[0]
        host = fault.endpoint // 8
        named = dataclasses.replace(_finding(fault.expected, [host]), ranks=(fault.endpoint,))
        other = dataclasses.replace(named, ranks=(host * 8 + (fault.endpoint + 1) % 8,))
        assert fault.recognised(named, topology)
        assert fault.recognised(other, topology) == any_rail


@pytest.mark.parametrize("hosts", [range(4), range(4, 8), range(8)])
def test_of_two_leaves_either_side_or_both_name_the_uplink(hosts: range) -> None:
    fault = _draws("congested_uplink", two_leaves())[0]
    assert fault.recognised(_finding("congested_uplink", hosts), two_leaves())


def test_nothing_names_a_healthy_fabric() -> None:
    assert draw_fault(np.random.default_rng(0), "none", two_leaves()) == HEALTHY
    assert not HEALTHY.recognised(_finding("slow_host", [0]), two_leaves())


def test_two_faults_differ_in_kind_and_place() -> None:
    topology = two_leaves()
    for seed in range(100):
        first, second = draw_two_faults(np.random.default_rng(seed), FAULTS, topology)
        assert first.injection != second.injection, f"seed {seed}"
        ends = [{fault.endpoint, *(end for pair in fault.pairs for end in pair)} for fault in (first, second)]
        assert not ends[0] & ends[1], f"seed {seed}"
