"""Where a run's time has gone: told stories, and what the ledger makes of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from launcher.goodput import CATEGORIES, STARTING, read_ledger
from launcher.goodput.ledger import ledger_of, windows_file
from megamodel.train.json_lines import append_line
from megamodel.train.run_directory import RunDirectory
from tests.launcher.goodput.story import COMPILE_S, STEP_S, Story

DAY_S = 86_400.0


def test_a_run_without_trouble(story: Story) -> None:
    story.launched(queued_s=30.0)
    story.attempts()
    story.loads()
    story.trains(20)
    story.ends()
    story.passes(0.7, "finishing")  # until the other ranks have ended too
    story.event("done")
    ledger = story.check()
    assert ledger.goodput == pytest.approx(20 * STEP_S / ledger.whole_s, rel=1e-3)
    assert ledger.starting_s == pytest.approx(1 + 3 + 7 + COMPILE_S, abs=0.05)
    (start,) = ledger.starts
    assert (start.number, start.first_step, start.last_step, start.ending) == (1, 1, 20, "finished")
    assert (start.num_ranks, start.hosts) == (2, ("n1", "n2"))
    assert ledger.failures == ()


def test_a_kill_in_the_middle(story: Story) -> None:
    story.launched()
    story.attempts()
    story.loads()
    story.trains(12)
    story.saves()
    story.loses(3)
    happened = story.clock + 0.3
    story.fails(after_s=1.0, at=happened, rank=1, host="n2")
    story.passes(4.0, "restarts")
    story.event("restart", attempt=2, reason="rank 1 on n2 died")
    story.attempts(preflight_s=2.0)
    story.loads()
    story.trains(8)
    story.ends()
    ledger = story.check()
    (failure,) = ledger.failures
    assert (failure.rank, failure.host, failure.kind, failure.lost_steps) == (1, "n2", "signal", 3)
    assert failure.detect_s == pytest.approx(0.7, abs=1e-3)
    again = 0.7 + 4.0 + 1.0 + 2.0 + 7.0 + COMPILE_S + STEP_S + 0.1
    assert failure.train_again_s == pytest.approx(again, abs=0.02)
    assert failure.lost_s == pytest.approx(3 * (STEP_S + 0.1) + 0.5, abs=0.02)  # the save held the first one up
    first, second = ledger.starts
    assert (first.first_step, first.last_step, first.ending) == (1, 15, "rank 1 on n2 died")
    assert (second.first_step, second.last_step) == (13, 20)


def test_a_failure_that_nobody_dates_is_counted_from_its_telling(story: Story) -> None:
    story.attempts()
    story.loads()
    story.trains(5)
    story.fails(after_s=2.0)
    story.attempts(launching_s=3.0, preflight_s=None)
    story.loads(seconds=5.0)
    story.trains(1)
    (failure,) = story.ledger(running=True).failures
    assert failure.detect_s is None
    assert failure.train_again_s == pytest.approx(8.0 + STEP_S + COMPILE_S + 0.1, abs=0.02)


def test_attempts_that_never_train_belong_to_the_failure_before_them(story: Story) -> None:
    story.attempts()
    story.loads()
    story.trains(5)
    story.loses(2)
    story.fails()
    for _ in range(2):
        story.attempts()
        story.event("failure", attempt=story.attempt, kind="preflight", message="n2: its disk is full")
        story.passes(1.0, "restarts")
    story.attempts()
    story.loads()
    story.trains(5)
    ledger = story.check(running=True)
    assert [failure.lost_steps for failure in ledger.failures] == [2, 0, 0]
    waits = [failure.train_again_s for failure in ledger.failures]
    assert None not in waits
    assert waits == sorted(waits, reverse=True)
    assert [start.last_step for start in ledger.starts] == [7, None, None, 10]


def test_giving_up_leaves_no_time_to_train_again(story: Story) -> None:
    story.attempts()
    story.loads()
    story.trains(5)
    story.fails()
    story.passes(1.0, "restarts")
    story.event("give_up", cause="rank 1 on n2 died, three times")
    ledger = story.check()
    assert [failure.train_again_s for failure in ledger.failures] == [None]
    assert ledger.starts[-1].ending == "rank 1 on n2 died"


def test_preemption_and_requeue(story: Story) -> None:
    story.launched(queued_s=5.0)
    story.attempts()
    story.loads()
    story.trains(8)
    story.event("stop_asked", signal="SIGTERM", reason="preemption")
    story.stops()
    story.event("requeue", reason="preemption", without=[])
    story.passes(600.0, "queued")
    story.event("launch", backend="slurm", job_id="17", nodes=2, host="n3", submitted=story.began)
    story.attempts()
    story.loads()
    story.trains(4)
    ledger = story.check(running=True)
    assert ledger.spent["queued"] == pytest.approx(605e6, abs=1e4)
    assert [start.ending for start in ledger.starts] == ["stopped by SIGTERM after step 8", ""]


def test_a_job_that_its_scheduler_starts_again_without_a_word(story: Story) -> None:
    story.launched(queued_s=5.0)
    story.attempts()
    story.loads()
    story.trains(10)
    story.passes(90.0, "queued")  # the first host is lost, and with it the supervisor
    story.event("launch", backend="slurm", job_id="17", nodes=2, host="n3")
    story.attempts()
    story.loads()
    story.trains(5)
    ledger = story.check(running=True)
    assert ledger.starts[0].ending == "no word of its end"


def test_two_starts_of_mega_train_a_day_apart(story: Story) -> None:
    story.loads()
    story.trains(7)
    story.stops()
    story.passes(DAY_S, "stopped")
    story.loads()
    story.trains(5)
    story.ends()
    story.event("export", step=12)
    ledger = story.check()
    assert [start.number for start in ledger.starts] == [1, 2]
    assert ledger.starts[0].num_ranks == 2
    assert ledger.starts[0].hosts == ("n1",)


def test_a_killed_start_is_stopped_from_its_last_record_on(story: Story) -> None:
    story.loads()
    story.trains(5)
    story.loses(3)
    story.passes(DAY_S, "stopped")
    story.loads()
    story.trains(5)
    ledger = story.check(running=True)
    assert ledger.starts[0].ending == "no word of its end"
    assert ledger.starts[0].last_step == 8
    assert ledger.failures == ()


def test_an_export_long_after_the_end_adds_nothing(story: Story) -> None:
    story.loads()
    story.trains(5)
    story.ends()
    end = story.clock
    story.clock += DAY_S
    story.event("export", step=5)
    story.clock = end
    story.check()


def test_a_run_that_goes_on_is_counted_up_to_now(story: Story) -> None:
    story.launched(queued_s=2.0)
    story.attempts()
    story.check(running=True)
    story.loads()
    story.check(running=True)
    story.trains(6)
    story.passes(40.0, "other")  # a step that takes long
    story.check(running=True)
    story.trains(1, first=False)
    story.ends(finishing_s=3.0)
    story.check()


@pytest.mark.parametrize("job_id", [None, "17"])
def test_the_loss_of_a_supervisor_is_told_by_the_one_that_takes_over(story: Story, job_id: str | None) -> None:
    story.launched(job_id=job_id)
    submitted = story.clock
    story.attempts()
    story.loads()
    story.trains(5)
    heard = story.clock
    story.fails(after_s=20.0, kind="host_lost", at=heard, host="n1", message="the supervisor of attempt 1 was lost")
    story.event("launch", backend="torchrun", job_id=job_id, nodes=2, host="n2", submitted=submitted)
    story.attempts()
    story.loads()
    story.trains(5)
    ledger = story.check(running=True)
    (failure,) = ledger.failures
    assert (failure.kind, failure.host, failure.detect_s) == ("host_lost", "n1", pytest.approx(20.0))
    assert ledger.starts[0].ending == "the supervisor of attempt 1 was lost"


def test_a_job_that_waits_while_the_run_trains_changes_nothing(story: Story) -> None:
    story.loads()
    story.trains(5)
    submitted = story.clock
    story.trains(5, first=False)
    story.ends()
    story.check(submitted=submitted)


def test_steps_lost_over_two_starts_because_a_checkpoint_was_damaged(story: Story) -> None:
    story.attempts()
    story.loads()
    story.trains(10)
    story.fails()
    story.attempts()
    story.loads()
    story.trains(4, saves=False)
    story.fails()
    story.saved = 5  # that of step 10 is damaged
    story.attempts()
    story.loads()
    story.trains(5)
    ledger = story.ledger(running=True)
    assert sum(ledger.spent.values()) == ledger.end - ledger.begin
    assert [failure.lost_steps for failure in ledger.failures] == [0, 9]
    # Steps 6 to 14, with what stood between them; never what the second start needed before its first step.
    assert 9 * STEP_S < ledger.spent["lost"] / 1e6 < 9 * STEP_S + COMPILE_S + 5.0
    assert ledger.spent["building"] == pytest.approx(21e6, abs=1e4)


def test_the_slowest_rank_has_its_share(story: Story) -> None:
    story.loads()
    story.trains(20)
    for first in range(9, 21, 4):
        late = {"0": 0.0, "1": 0.1, "2": 0.9, "3": 0.05}
        line: dict[str, Any] = {"first_step": first, "step": first + 3, "step_s": STEP_S, "late_s": late, "busy_s": {}}
        append_line(windows_file(story.root), line)
    ledger = story.ledger(running=True)
    assert ledger.spent["stragglers"] == 12 * 800_000
    assert sum(ledger.spent.values()) == ledger.end - ledger.begin


def test_nothing_is_made_of_nothing(tmp_path: Path) -> None:
    assert read_ledger(RunDirectory(tmp_path), now=None) is None
    assert read_ledger(RunDirectory(tmp_path), now=1.0) is None


def test_damaged_records_are_passed_over(story: Story) -> None:
    story.attempts()
    story.loads()
    story.trains(6)
    with story.run.events.open("ab") as file:
        file.write(b'{"time": "soon", "event": "attempt"}\n{"time": 1}\n\x00\x00\n{"event": 5, "time": NaN}\n[1]\n')
        file.write(b'{"time": 1700000005.0, "event": "rollback", "since": "x", "until": [], "lost_steps": null}\n')
        file.write(b'{"time": 1700000006.0, "event": "failure", "at": "no", "attempt": {}}\n{"time": 17000')
    with story.run.metrics.open("ab") as file:
        file.write(b'{"time": 1700000050.0, "step": "x", "loss": 1}\n{"time": 1700000050.0}\n')
        file.write(
            b'{"time": null, "step": 3, "loss": 1}\n{"time": 1700000051.0, "step": 7, "loss": 1, "step_time_s": "y"}'
        )
    ledger = story.ledger(running=True)
    assert sum(ledger.spent.values()) == ledger.end - ledger.begin


@pytest.mark.parametrize("seed", range(150))
def test_whatever_happens_the_parts_make_up_the_whole(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    story = Story(root=tmp_path / "run")
    supervised = choose.random() < 0.7
    if supervised:
        story.launched(queued_s=choose.choice([0.0, 3.0]))
    for _ in range(choose.randint(1, 6)):
        if supervised:
            story.attempts(launching_s=choose.uniform(0.1, 3.0), preflight_s=choose.choice([None, 2.0]))
        story.loads(seconds=choose.uniform(1.0, 9.0))
        story.trains(choose.randint(3, 12), data_s=choose.choice([0.0, 0.3]))
        if choose.random() < 0.5 and story.step % 5:
            story.saves()
            story.trains(1, first=False)
            story.saves()
        end = choose.choice(["fails", "loses", "stops"]) if supervised else choose.choice(["killed", "stops"])
        if end == "stops":
            story.stops()
            if supervised:
                story.event("requeue", reason="time_limit", without=[])
                story.launched(queued_s=choose.uniform(0.0, 500.0))
            else:
                story.passes(choose.uniform(1.0, DAY_S), "stopped")
            continue
        if story.saved != story.step:
            story.saves()
            story.trains(1, first=False, saves=False)
            story.saves()
        if choose.random() < 0.7:
            story.loses(choose.randint(1, 6))
        if supervised:
            story.fails(after_s=choose.uniform(0.5, 60.0))
            story.passes(choose.uniform(0.1, 5.0), "restarts")
        else:
            story.passes(choose.uniform(1.0, DAY_S), "stopped")
        story.held_up_s = 0.0
    if supervised:
        story.attempts()
    story.loads()
    story.trains(3)
    if choose.random() < 0.5:
        story.ends()
        story.check()
    else:
        story.check(running=True)


@pytest.mark.parametrize("seed", range(50))
def test_clocks_that_differ_break_no_sum(tmp_path: Path, seed: int) -> None:
    """Supervisor and first rank may be on two hosts."""
    choose = random.Random(seed)
    story = Story(root=tmp_path / "run")
    story.launched(queued_s=2.0)
    for _ in range(4):
        story.attempts()
        story.loads()
        story.trains(choose.randint(1, 9))
        story.fails()
    events = [{**event, "time": event["time"] + choose.uniform(-5, 5)} for event in story.run.read_events()]
    choose.shuffle(events)
    ledger = ledger_of(events, story.run.read_metrics(), now=story.clock)
    assert ledger is not None
    assert sum(ledger.spent.values()) == ledger.end - ledger.begin
    assert all(microseconds >= 0 for microseconds in ledger.spent.values())


def test_plain_data(story: Story) -> None:
    story.loads()
    story.trains(6)
    data = story.ledger().as_data()
    assert set(data["seconds"]) == set(CATEGORIES)
    assert set(STARTING) < set(CATEGORIES)
    assert data["whole_s"] == pytest.approx(data["end"] - data["begin"], abs=1e-5)
    assert data["goodput"] == pytest.approx(data["seconds"]["steps"] / data["whole_s"])
    assert data["starting_s"] == pytest.approx(sum(data["seconds"][part] for part in STARTING))
