"""From messages to windows: the rule of lateness, what the network takes, and what is left out."""

from __future__ import annotations

import random

import pytest

from cluster.fabric.monitor.durations import StepDurations
from cluster.fabric.monitor.windows import Gathering, Sample, group_times, window_of, work_of
from tests.cluster.fabric.monitor.stories import WORLD, step_of, windows_of


def test_the_late_rank_has_the_shortest_duration() -> None:
    sample = Sample(step=1, ranks=step_of(1, {0: 0.10, 1: 0.10, 2: 0.14, 3: 0.11}, network_s=0.02))
    times = group_times(sample)[WORLD]
    assert times.late_s == pytest.approx({0: 0.0, 1: 0.0, 2: 0.04, 3: 0.01})
    assert times.floor_s == pytest.approx({"all_reduce": 0.02})
    window = window_of([sample])
    assert window.axes["world"].waited_s == pytest.approx((0.06 + 0.06 + 0.02 + 0.05) / 4)
    assert window.effects[0][2] == pytest.approx(0.4)
    assert window.kinds_s == pytest.approx({("world", "all_reduce"): 0.02})


def test_a_group_that_not_all_ranks_told_of_says_nothing() -> None:
    ranks = step_of(1, {0: 0.1, 1: 0.1, 2: 0.1, 3: 0.1})
    del ranks[3]
    assert group_times(Sample(step=1, ranks=ranks)) == {}


def test_what_does_not_end_together_is_no_evidence() -> None:
    def with_kind(told: StepDurations) -> StepDurations:
        payload = told.as_payload()
        payload["groups"][0]["kinds"] = ["broadcast"]
        return StepDurations.from_payload(payload)

    ranks = {rank: with_kind(told) for rank, told in step_of(1, {0: 0.1, 1: 0.2, 2: 0.1, 3: 0.1}).items()}
    assert group_times(Sample(step=1, ranks=ranks))[WORLD].floor_s == {}


def test_without_waits_work_is_the_step_without_its_collectives() -> None:
    told = step_of(1, {0: 0.10, 1: 0.10, 2: 0.14, 3: 0.10}, knows_waits=False)
    assert work_of(told[2]) == pytest.approx(0.14)
    assert work_of(told[0]) == pytest.approx(0.10)


def test_windows_hold_the_steps_that_all_have_told_of() -> None:
    gathering = Gathering(world_size=4, window_steps=5)
    work = dict.fromkeys(range(4), 0.1)
    windows = []
    for step in range(40):
        for rank, told in step_of(step, work, every=2).items():
            if step % 2 == 0 or rank != 3:  # rank 3 watches only half of the steps
                windows.append(gathering.add(rank, told))
    complete = [window for window in windows if window is not None]
    assert [window.first_step for window in complete] == [0, 6, 12, 18, 24, 30]
    assert all(sample.step % 2 == 0 for window in complete for sample in window.samples)
    assert len(gathering._pending) <= 33


def test_a_run_that_goes_back_to_a_checkpoint_begins_a_new_window() -> None:
    work = dict.fromkeys(range(4), 0.1)
    windows = windows_of([10, 11, 12, 13, 8, 9, 10, 11, 12], lambda step: step_of(step, work))
    assert [(window.first_step, window.last_step) for window in windows] == [(8, 12)]


def test_medians_over_peers_leave_the_rank_itself_out() -> None:
    generator = random.Random(3)
    for count in range(2, 9):
        work = {rank: generator.uniform(0.1, 0.2) for rank in range(count)}
        sample = Sample(step=1, ranks=step_of(1, work, groups=(("world", tuple(work)),)))
        for rank, effect in window_of([sample]).effects[0].items():
            others = sorted(seconds for other, seconds in work.items() if other != rank)
            middle = (others[(count - 2) // 2] + others[(count - 1) // 2]) / 2
            assert effect == pytest.approx(work[rank] / middle - 1), (count, rank)
