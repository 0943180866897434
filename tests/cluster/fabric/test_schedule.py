"""Schedules: every pair once, nobody twice in a round, halves against halves first."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.fabric.schedule import both_ways, circle_rounds, halving_rounds, random_pairs, renamed


@pytest.mark.parametrize("count", [2, 3, 5, 6, 7, 8, 9, 16, 33, 64])
@pytest.mark.parametrize("rounds_of", [circle_rounds, halving_rounds])
def test_every_pair_meets_once_and_nobody_is_in_two_pairs_of_a_round(rounds_of: object, count: int) -> None:
    rounds = rounds_of(count)  # type: ignore[operator]
    pairs = {tuple(pair) for pair in np.concatenate(rounds).tolist()}
    assert len(pairs) == sum(len(each) for each in rounds) == count * (count - 1) // 2
    assert all(low < high for low, high in pairs)
    assert all(np.unique(each).size == each.size for each in rounds)


@pytest.mark.parametrize("count", [2, 5, 8, 64])
def test_the_circle_takes_as_few_rounds_as_can_be(count: int) -> None:
    assert len(circle_rounds(count)) == count - 1 + count % 2


@pytest.mark.parametrize("count", [4, 8, 16, 64])
def test_between_halves_all_pairs_of_a_round_cross_or_none(count: int) -> None:
    rounds = halving_rounds(count)
    assert len(rounds) == count - 1
    crossing = [int(((each < count // 2).sum(axis=1) == 1).sum()) for each in rounds]
    assert crossing == [count // 2] * (count // 2) + [0] * (count // 2 - 1)


def test_both_ways_is_there_and_back() -> None:
    assert both_ways(np.array([[0, 3], [1, 2]])).tolist() == [[0, 3], [1, 2], [3, 0], [2, 1]]


def test_renamed_rounds_are_the_same_tournament_of_others() -> None:
    rounds = renamed(circle_rounds(4), [7, 3, 9, 1])
    assert {tuple(pair) for pair in np.concatenate(rounds).tolist()} == {(1, 3), (1, 7), (1, 9), (3, 7), (3, 9), (7, 9)}


def test_random_pairs_are_disjoint_and_leave_out_one_at_most() -> None:
    pairs = random_pairs(range(9), np.random.default_rng(4))
    assert pairs.shape == (4, 2)
    assert np.unique(pairs).size == 8
