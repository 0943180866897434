"""Which links a flow crosses, in fat-trees, rails and the two leaves of the tests' own hosts."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.fabric.simulation.topology import Topology, fat_tree, two_leaves


def _shift(topology: Topology, distance: int) -> np.ndarray:
    numbers = np.arange(topology.num_endpoints)
    return np.stack([numbers, (numbers + distance) % topology.num_endpoints], axis=1)


def _sharers(topology: Topology, flows: np.ndarray) -> int:
    """The most flows on one link."""
    routes = topology.routes(flows)
    return int(np.bincount(routes[routes < topology.num_links]).max())


def test_a_flow_crosses_as_many_links_as_it_has_levels_to_climb() -> None:
    topology = fat_tree(16384)
    flows = np.array([[0, 1], [0, 40], [0, 16000]])
    crossed = (topology.routes(flows) < topology.num_links).sum(1)
    assert crossed.tolist() == [2, 4, 6]


def test_ends_and_cables_lie_where_the_topology_says() -> None:
    topology = fat_tree(1024, salt=3)
    sender, receiver = 5, 700
    out, into, up, down = topology.routes(np.array([[sender, receiver]]))[0, :4].tolist()
    assert (out, into) == (topology.out_of(sender), topology.into(receiver))
    spines = [spine for spine in range(topology.spines) if topology.cable(sender // 32, spine)[0] == up]
    assert len(spines) == 1
    assert topology.cable(receiver // 32, spines[0])[1] == down


def test_links_are_numbered_without_overlap() -> None:
    topology = fat_tree(16384)
    cables = np.array([topology.cable(leaf, spine) for leaf in range(512) for spine in range(32)])
    ends = [topology.out_of(number) for number in range(16384)] + [topology.into(number) for number in range(16384)]
    assert len(np.unique(np.concatenate([cables.reshape(-1), ends]))) == 4 * 16384
    crossed = np.unique(topology.routes(_shift(topology, 1000)))
    assert crossed.max() <= topology.num_links
    assert len(topology.capacities()) == topology.num_links + 1


def test_static_routes_of_a_shift_share_no_cable_and_hashed_ones_do() -> None:
    assert _sharers(fat_tree(16384, routing="static"), _shift(fat_tree(16384), 32 * 77)) == 1
    assert _sharers(fat_tree(16384, routing="ecmp"), _shift(fat_tree(16384), 32 * 77)) > 1
    assert _sharers(fat_tree(16384, routing="ecmp"), np.array([[i, i ^ 1] for i in range(16384)])) == 1, "within leaves"


def test_a_hash_spreads_evenly_and_depends_on_its_salt() -> None:
    flows = _shift(fat_tree(1024), 512)
    routes = [fat_tree(1024, salt=salt).routes(flows) for salt in (1, 2, 2)]
    assert (routes[1] == routes[2]).all()
    assert (routes[0][:, 2] != routes[1][:, 2]).mean() > 0.9
    per_spine = np.bincount(routes[0][:, 2] % 32, minlength=32)
    assert per_spine.min() > 10, "1,024 flows over 32 spines: 32 each on average"


def test_there_and_back_are_hashed_apart() -> None:
    topology = fat_tree(1024)
    flows = _shift(topology, 512)
    there, back = topology.routes(flows)[:, 2] % 32, topology.routes(flows[:, ::-1])[:, 2] % 32
    assert (there == back).mean() < 0.1


def test_rails_have_leaves_of_their_own() -> None:
    topology = fat_tree(64, rails=8)
    endpoints = topology.endpoints()
    assert len(endpoints) == 512
    assert {endpoint.rail for endpoint in endpoints if endpoint.leaf == endpoints[3].leaf} == {3}
    assert len({endpoint.leaf for endpoint in endpoints[:8]}) == 8
    assert {endpoint.host for endpoint in endpoints[:8]} == {"h0"}


def test_endpoints_of_one_host_reach_one_another_without_the_network() -> None:
    topology = fat_tree(64, rails=8)
    crossed = topology.routes(np.array([[0, 1]]))[0]
    network = {topology.out_of(0), topology.into(1)}
    assert not network & set(crossed.tolist())
    assert topology.capacities()[crossed[0]] > topology.host_rate


@pytest.mark.parametrize("oversubscription", [1.0, 2.0, 4.0])
def test_oversubscription_leaves_fewer_cables(oversubscription: float) -> None:
    topology = fat_tree(1024, oversubscription=oversubscription)
    cables = topology.spines * topology.cable_rate
    assert topology.hosts_per_leaf * topology.host_rate / cables == oversubscription


def test_the_uplink_of_two_leaves_carries_a_quarter_more_than_its_hosts_send() -> None:
    topology = two_leaves(8)
    assert topology.num_leaves == 2
    assert _sharers(topology, _shift(topology, 4)) == 4
    assert topology.cable_rate == 1.25 * 4 * topology.host_rate
