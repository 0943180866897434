"""Who sends to whom under many leaves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cluster.fabric.simulation.topology import fat_tree, two_leaves
from cluster.fabric.wide.layout import NO_FLOWS, Layout, has_many_leaves, layout_of, pairs_for, without


def _layout(hosts: int = 1024, rails: int = 1) -> Layout:
    return layout_of(fat_tree(hosts, rails=rails).endpoints())


def _is_disjoint(flows: np.ndarray) -> bool:
    return all(len(np.unique(flows[:, side])) == len(flows) for side in (0, 1))


def test_neighbours_share_a_leaf_and_everyone_sends_and_receives_once() -> None:
    layout = _layout()
    for shift in (1, 2, 3):
        flows = layout.neighbours(shift)
        assert len(flows) == 1024
        assert _is_disjoint(flows)
        assert (layout.leaf_of[flows[:, 0]] == layout.leaf_of[flows[:, 1]]).all()
    assert not (layout.neighbours(1) == layout.neighbours(2)).all(1).any()


def test_shifts_between_leaves_keep_the_position_so_that_tables_keep_them_apart() -> None:
    topology = fat_tree(16384, routing="static")
    for shift in (256, 170, 103):
        flows = _layout(16384).across(shift, most=None, rng=np.random.default_rng(0))
        routes = topology.routes(flows)
        assert len(flows) == 16384
        assert np.bincount(routes[routes < topology.num_links]).max() == 1, f"shift {shift}"


def test_fewer_flows_a_leaf_are_drawn_by_chance() -> None:
    layout = _layout()
    flows = layout.across(5, most=8, rng=np.random.default_rng(0))
    assert np.bincount(layout.leaf_of[flows[:, 0]]).tolist() == [8] * 32
    assert _is_disjoint(flows)


def test_flows_of_a_host_to_itself_cross_no_leaf_and_are_left_out() -> None:
    layout = _layout(64, rails=8)
    every = [layout.across(shift, most=None, rng=np.random.default_rng(0)) for shift in range(1, layout.num_leaves)]
    assert all((layout.host_of[flows[:, 0]] != layout.host_of[flows[:, 1]]).all() for flows in every)
    assert {len(flows) for flows in every} == {0, 512}


def test_suspects_meet_good_ones_of_their_leaf_and_others_at_the_next_turn() -> None:
    layout = _layout()
    suspects, good = np.array([3, 4, 700]), np.ones(1024, dtype=bool)
    good[[3, 4, 5, 700]] = False
    first, second = layout.repairs(suspects, good, 0), layout.repairs(suspects, good, 3)
    assert len(first) == 6
    assert _is_disjoint(first)
    partners = np.setdiff1d(first, suspects)
    assert good[partners].all()
    assert set(layout.leaf_of[partners]) == {0, 21}
    assert not set(map(tuple, first.tolist())) & set(map(tuple, second.tolist()))


def test_suspects_without_a_good_neighbour_are_left_out() -> None:
    layout = _layout()
    good = np.ones(1024, dtype=bool)
    good[:31] = False
    assert len(layout.repairs(np.arange(31), good, 0)) == 2


def test_without_leaves_all_are_neighbours() -> None:
    endpoints = [dataclasses.replace(endpoint, leaf=None) for endpoint in fat_tree(128).endpoints()]
    layout = layout_of(endpoints)
    assert layout.num_leaves == 1
    assert _is_disjoint(layout.neighbours(1))


@pytest.mark.parametrize("rails", [1, 4])
def test_leaves_hold_their_endpoints(rails: int) -> None:
    layout = _layout(64, rails=rails)
    assert sorted(np.concatenate(layout.members).tolist()) == list(range(64 * rails))
    for number, members in enumerate(layout.members):
        assert set(layout.leaf_of[members]) == {number}


def test_flows_give_way_to_those_that_are_taken() -> None:
    flows = np.array([[0, 1], [1, 2], [2, 3], [4, 0]])
    assert without(flows, np.array([[1, 5], [6, 3]])).tolist() == [[0, 1], [4, 0]]
    good = np.array([True, True, True, True, False, True, True])
    assert without(flows, NO_FLOWS, good).tolist() == [[0, 1], [1, 2], [2, 3]]


def test_many_leaves_are_three_or_more_that_are_known() -> None:
    assert has_many_leaves(fat_tree(24).endpoints())
    assert not has_many_leaves(fat_tree(16).endpoints())
    assert not has_many_leaves(two_leaves(64).endpoints())
    assert not has_many_leaves([dataclasses.replace(endpoint, leaf=None) for endpoint in fat_tree(1024).endpoints()])


def test_open_ends_meet_settled_ones() -> None:
    open_ends = np.zeros((2, 100), dtype=bool)
    open_ends[0, [3, 4]] = open_ends[1, [3, 50]] = True
    flows = pairs_for(open_ends, 4, np.random.default_rng(0))
    assert _is_disjoint(flows)
    assert len(flows) == 4
    assert {3, 4} <= set(flows[:, 0].tolist())
    assert {3, 50} <= set(flows[:, 1].tolist())
    assert not [flow for flow in flows.tolist() if open_ends[0, flow[0]] and open_ends[1, flow[1]]]


def test_while_all_ends_are_open_any_two_meet() -> None:
    flows = pairs_for(np.ones((2, 100), dtype=bool), 24, np.random.default_rng(0))
    assert len(flows) == 24
    assert _is_disjoint(flows)
    assert (flows[:, 0] != flows[:, 1]).all()
