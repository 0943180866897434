"""From messages to windows: the rule of lateness, what the network takes, and what is left out."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from cluster.fabric.monitor.durations import RankLists, StepDurations
from cluster.fabric.monitor.gathering import Gathering
from cluster.fabric.monitor.windows import Sample, burdens_of, group_times, window_of
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
        payload = told.as_payload(RankLists())
        payload["groups"][0]["kinds"] = ["broadcast"]
        return StepDurations.from_payload(payload, RankLists())

    ranks = {rank: with_kind(told) for rank, told in step_of(1, {0: 0.1, 1: 0.2, 2: 0.1, 3: 0.1}).items()}
    assert group_times(Sample(step=1, ranks=ranks))[WORLD].floor_s == {}


def test_without_waits_it_counts_who_is_late_by_his_own_fault() -> None:
    groups = (("tp", (0, 1)), ("tp", (2, 3)), ("dp", (0, 2)), ("dp", (1, 3)))
    ranks = step_of(1, {0: 0.10, 1: 0.10, 2: 0.14, 3: 0.10}, groups=groups, knows_waits=False)
    sample = Sample(step=1, ranks=ranks)
    # 3 waits for 2 in tp, and is late in dp for that.
    assert group_times(sample)["dp", (1, 3)].late_s[3] == pytest.approx(0.04)
    assert burdens_of(sample, group_times(sample)) == pytest.approx({0: 0.0, 1: 0.0, 2: 0.04, 3: 0.0})


def test_two_process_groups_of_the_same_ranks_are_added() -> None:
    def twice(told: StepDurations, back: bool) -> StepDurations:
        other = replace(told.groups[0], num_bytes=(7,), seconds=(0.5,), waited_s=0.5)
        return replace(told, groups=(other, told.groups[0]) if back else (told.groups[0], other))

    ranks = step_of(1, {0: 0.10, 1: 0.10, 2: 0.14, 3: 0.11}, network_s=0.02)
    sample = Sample(step=1, ranks={rank: twice(told, rank % 2 == 0) for rank, told in ranks.items()})
    times = group_times(sample)[WORLD]
    assert times.floor_s == pytest.approx({"all_reduce": 0.52})
    assert times.late_s == pytest.approx({0: 0.0, 1: 0.0, 2: 0.04, 3: 0.01})


def test_windows_hold_the_steps_that_all_have_told_of() -> None:
    gathering = Gathering(world_size=4, window_steps=5)
    work = dict.fromkeys(range(4), 0.1)
    windows = []
    for step in range(40):
        for rank, told in step_of(step, work, every=2).items():
            if step % 2 == 0 or rank != 3:  # rank 3 watches only half of the steps
                windows += gathering.add(rank, told, float(step))
    assert [window.first_step for window in windows] == [0, 6, 12, 18, 24, 30]
    assert all(sample.step % 2 == 0 for window in windows for sample in window.samples)
    assert len(gathering._pending) <= 1


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
