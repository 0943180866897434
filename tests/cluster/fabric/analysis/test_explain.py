"""From a matrix of rates to the parts that were slowed in it."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.fabric.analysis.explain import Explanation, Part, divisions, explain, path, receiver, sender, uplink
from cluster.fabric.analysis.observations import Observations
from cluster.fabric.schedule import both_ways, circle_rounds, halving_rounds, renamed

COUNT = 8
HALVES = frozenset(range(4)), frozenset(range(4, 8))


def seen_with(slow: dict[Part, float], *, seed: int, noise: float = 0.03, count: int = COUNT) -> Observations:
    """Three repeats of all pairs; a flow keeps the smallest share of the parts that it passes. A few outliers."""
    rng = np.random.default_rng(seed)
    seen = Observations(count)
    for repeat in range(3):
        rounds = renamed(circle_rounds(count), rng.permutation(count)) if repeat == 1 else halving_rounds(count)
        for pairs in rounds:
            flows = both_ways(pairs)
            keep = np.ones(len(flows))
            for part, share in slow.items():
                keep = np.where(part.passed_by(flows), np.minimum(keep, share), keep)
            keep[rng.random(len(flows)) < 0.02] /= 2
            seen.add(flows, 6e6 * keep * np.exp(noise * rng.standard_normal(len(flows))))
    return seen


def explained(slow: dict[Part, float], *, seed: int, count: int = COUNT) -> Explanation:
    """Leaves unknown, a loss of a tenth of interest."""
    return explain(seen_with(slow, seed=seed, count=count), leaves=[None] * count, least_effect=0.1)


@pytest.mark.parametrize(
    "parts",
    [
        [sender(3, COUNT)],
        [receiver(5, COUNT)],
        [sender(2, COUNT), receiver(2, COUNT)],
        [path(1, 6)],
        [uplink(*HALVES)],
        [uplink(*HALVES), uplink(*HALVES[::-1])],
        [sender(1, COUNT), sender(6, COUNT)],
        [receiver(0, COUNT), receiver(5, COUNT)],
        [sender(1, COUNT), path(4, 3)],
        [uplink(*HALVES), sender(6, COUNT)],
        [uplink(*HALVES), path(6, 7)],
    ],
)
@pytest.mark.parametrize("share", [0.35, 0.75])
def test_the_slowed_parts_are_suspected_and_no_others(parts: list[Part], share: float) -> None:
    for seed in range(3):
        # Different shares: two parts that lost the same look like a part of both.
        slow = {part: share + 0.05 * index for index, part in enumerate(parts)}
        found = {suspicion.part for suspicion in explained(slow, seed=seed).suspicions}
        assert found == set(parts), f"seed {seed}"


def test_of_healthy_rates_hardly_anything_is_suspected() -> None:
    suspected = sum(bool(explained({}, seed=seed).suspicions) for seed in range(40))
    assert suspected <= 4


def test_the_healthy_level_is_found_where_most_pairs_cross_a_congested_uplink() -> None:
    slow = {uplink(*HALVES): 0.4, uplink(*HALVES[::-1]): 0.5}
    assert explained(slow, seed=2).healthy_log_rate == pytest.approx(np.log(6e6), abs=0.03)


def test_a_suspicion_tells_the_effect_and_how_erratic_it_is() -> None:
    (suspicion,) = explained({sender(3, COUNT): 0.5}, seed=1).suspicions
    assert suspicion.effect == pytest.approx(np.log(0.5), abs=0.05)
    assert suspicion.spread < 0.1


def test_sixty_four_endpoints_are_explained_as_well() -> None:
    found = explained({sender(40, 64): 0.7, path(3, 50): 0.4}, seed=0, count=64).suspicions
    assert {suspicion.part for suspicion in found} == {sender(40, 64), path(3, 50)}


def test_known_leaves_are_the_only_groups_that_an_uplink_may_join() -> None:
    assert divisions(6, ["a", "b", "a", "b", "b", "a"]) == [frozenset({0, 2, 5}), frozenset({1, 3, 4})]
    assert frozenset({1, 3, 4, 6}) in divisions(8, [None] * 8)
    assert all(2 <= len(side) <= 6 for side in divisions(8, [None] * 8))
