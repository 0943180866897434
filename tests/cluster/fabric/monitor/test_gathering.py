"""Steps and windows where some rank's messages do not get through."""

from __future__ import annotations

import random

from cluster.fabric.monitor.durations import StepDurations
from cluster.fabric.monitor.gathering import DEADLINE_SECONDS, Gathering
from cluster.fabric.monitor.stragglers import StragglerSearch
from cluster.fabric.monitor.windows import Window
from tests.cluster.fabric.monitor.stories import step_of

WORK = dict.fromkeys(range(4), 0.1)


def _run(gathering: Gathering, steps: range, missing: dict[int, list[int]], seconds: float = 1.0) -> list[Window]:
    """Each step takes `seconds`; the head looks once in each. `missing`: by step, whose message is lost."""
    windows = []
    for step in steps:
        for rank, told in step_of(step, {**WORK, 2: 0.15}).items():
            if rank not in missing.get(step, []):
                windows += gathering.add(rank, told, step * seconds)
        windows += gathering.expire(step * seconds)
    return windows


def test_a_silent_rank_does_not_silence_the_others() -> None:
    gathering = Gathering(world_size=4, window_steps=5)
    windows = _run(gathering, range(60), {step: [1] for step in range(60)})
    assert [window.first_step for window in windows] == list(range(0, 50, 5))
    assert all(window.roles.keys() == {0, 2, 3} for window in windows)
    assert gathering.new_silent_ranks() == (1,)
    assert gathering.new_silent_ranks() == ()
    search = StragglerSearch(host_of=lambda rank: f"h{rank}")
    (found,) = [finding for window in windows for finding in search.add(window)]
    assert found.ranks == (2,)


def test_lost_messages_cost_little() -> None:
    generator = random.Random(11)
    lost = {step: [rank for rank in range(4) if generator.random() < 0.1] for step in range(100)}
    gathering = Gathering(world_size=4, window_steps=5)
    windows = _run(gathering, range(100), lost)
    assert sum(len(window.samples) for window in windows) >= 85
    assert all(window.roles.keys() == set(range(4)) for window in windows)
    steps = [sample.step for window in windows for sample in window.samples]
    assert steps == sorted(steps)
    assert gathering.new_silent_ranks() == ()


def test_before_the_deadline_nothing_is_concluded() -> None:
    gathering = Gathering(world_size=4, window_steps=3)
    assert _run(gathering, range(20), {step: [1] for step in range(20)}, seconds=DEADLINE_SECONDS / 20) == []
    assert len(gathering.expire(3 * DEADLINE_SECONDS)) == 6


def test_less_than_half_of_the_ranks_say_nothing() -> None:
    gathering = Gathering(world_size=4, window_steps=3)
    assert _run(gathering, range(40), {step: [1, 3] for step in range(40)}) == []
    assert gathering.new_silent_ranks() == (1, 3)


def test_ranks_that_watch_fewer_steps_are_not_silent() -> None:
    gathering = Gathering(world_size=4, window_steps=4)
    windows: list[Window] = []
    for step in range(400):
        for rank, told in step_of(step, WORK, every=1).items():
            every = 8 if rank == 3 else 1
            if step % every == 0:
                windows += gathering.add(rank, _every(told, every), float(step))
        windows += gathering.expire(float(step))
    assert gathering.new_silent_ranks() == ()
    assert all(sample.step % 8 == 0 for window in windows for sample in window.samples)


def test_one_that_takes_its_leave_is_not_waited_for() -> None:
    gathering = Gathering(world_size=4, window_steps=5)
    gathering.leave_out(1)
    windows = _run(gathering, range(10), {step: [1] for step in range(10)}, seconds=0.0)
    assert [window.first_step for window in windows] == [0, 5]


def _every(told: StepDurations, every: int) -> StepDurations:
    return StepDurations(**{**vars(told), "every": every})
