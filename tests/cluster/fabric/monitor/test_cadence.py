"""Which steps are watched: by cost, and the same ones on all ranks."""

from __future__ import annotations

import pytest

from cluster.fabric.monitor.cadence import COST_SHARE, Cadence


@pytest.mark.parametrize(("cost_s", "step_s"), [(0.001, 1.0), (0.002, 0.05), (0.05, 2.0), (0.001, 0.01)])
def test_the_cost_stays_below_its_share(cost_s: float, step_s: float) -> None:
    cadence = Cadence(least_s=0.0)
    for _ in range(20):
        cadence.learn(cost_s=cost_s, step_s=step_s)
    assert cost_s / cadence.every / step_s <= COST_SHARE or cadence.every == 512
    assert cadence.every == 1 or cost_s / (cadence.every / 4) / step_s > COST_SHARE


def test_steps_of_the_rank_that_watches_least_are_watched_by_all() -> None:
    cadences = [Cadence(least_s=0.0) for _ in range(3)]
    for cadence, cost_s in zip(cadences, (0.001, 0.01, 0.03), strict=True):
        for _ in range(5):
            cadence.learn(cost_s=cost_s, step_s=1.0)
    most = max(cadence.every for cadence in cadences)
    assert most > min(cadence.every for cadence in cadences)
    assert all(cadence.due(step) for cadence in cadences for step in range(0, 1000, most))


def test_short_steps_do_not_swamp_the_reader() -> None:
    cadence = Cadence(least_s=0.2)
    for _ in range(5):
        cadence.learn(cost_s=0.0, step_s=0.01)
    assert cadence.every * 0.01 >= 0.2


def test_one_bad_moment_does_not_blind_the_monitor() -> None:
    cadence = Cadence(least_s=0.0)
    cadence.learn(cost_s=5.0, step_s=0.5)
    assert cadence.every <= 16
    for _ in range(6):
        cadence.learn(cost_s=0.001, step_s=0.5)
    assert cadence.every <= 2
