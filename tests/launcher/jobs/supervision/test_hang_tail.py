"""When a finding of the watch is a hang. The clock is the test's own."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.fabric.findings import Finding, Kind
from launcher.jobs.config import LaunchConfig
from launcher.jobs.supervision.hang_tail import HangTail, watched_ranks
from megamodel.train.run_directory import RunDirectory


class _Clock:
    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "fabric").mkdir()
    return RunDirectory(tmp_path)


def _tail(run: RunDirectory, clock: _Clock, *, hang_seconds: float = 0.0) -> HangTail:
    return HangTail(run, patience_s=10.0, hang_seconds=hang_seconds, clock=clock)


def _tell(
    run: RunDirectory, kind: Kind, sentence: str = "rank 3 is gone.", *, at: float | None = None, **evidence: Any
) -> None:
    finding = Finding(kind=kind, hosts=("n3",), ranks=(3,), confidence=0.9, evidence=evidence, sentence=sentence)
    with (run.root / "fabric" / "findings.jsonl").open("a") as file:
        file.write(json.dumps({"time": at or time.time(), **finding.as_data()}) + "\n")


def _watch(run: RunDirectory, quiet_s: list[float], *, updated: float) -> None:
    ranks = [
        {"rank": rank, "host": f"n{rank}", "state": "training", "quiet_s": quiet, "doing": "all_reduce on dp"}
        for rank, quiet in enumerate(quiet_s)
    ]
    state = {"updated": updated, "ended": False, "ranks": ranks}
    (run.root / "fabric" / "watch.json").write_text(json.dumps(state))


@pytest.mark.parametrize("kind", ["missing_rank", "mismatched_collective", "transport_fault"])
def test_a_finding_without_a_step_after_it_is_a_hang(run: RunDirectory, clock: _Clock, kind: Kind) -> None:
    tail = _tail(run, clock)
    run.append_metrics({"step": 5})
    assert tail.look() is None
    told = time.time()
    _tell(run, kind, "the first", at=told, waited_s=8.0)
    _tell(run, kind, "what follows from it")
    assert tail.look() is None
    clock.now += 9.9
    assert tail.look() is None
    clock.now += 0.2
    found = tail.look()
    assert found is not None
    assert found.finding.sentence == "the first"
    assert found.at == told - 8.0


def test_a_step_after_the_finding_takes_it_back(run: RunDirectory, clock: _Clock) -> None:
    tail = _tail(run, clock)
    run.append_metrics({"step": 5})
    _tell(run, "missing_rank")
    assert tail.look() is None
    run.append_metrics({"step": 6})
    clock.now += 100.0
    assert tail.look() is None
    clock.now += 100.0
    assert tail.look() is None


@pytest.mark.parametrize("kind", ["slow_host", "congested_uplink", "bad_path"])
def test_what_only_slows_the_run_is_no_hang(run: RunDirectory, clock: _Clock, kind: Kind) -> None:
    tail = _tail(run, clock)
    _tell(run, kind)
    assert tail.look() is None
    clock.now += 100.0
    assert tail.look() is None


def test_with_endless_patience_hangs_are_only_told(run: RunDirectory, clock: _Clock) -> None:
    tail = HangTail(
        run,
        hang_seconds=0.0,
        patience_s=LaunchConfig.model_validate({"end_hangs_after_seconds": "inf"}).end_hangs_after_seconds,
        clock=clock,
    )
    _tell(run, "missing_rank")
    assert tail.look() is None
    clock.now += 1e9
    assert tail.look() is None


def test_findings_of_an_earlier_attempt_are_passed_over(run: RunDirectory, clock: _Clock) -> None:
    _tell(run, "missing_rank")
    tail = _tail(run, clock)
    tail.look()
    clock.now += 100.0
    assert tail.look() is None


@pytest.mark.parametrize(("hang_seconds", "ours"), [(8.0, 5.0), (2.0, 2.0)])
def test_the_last_word_of_an_earlier_attempts_watch_is_passed_over(
    run: RunDirectory, clock: _Clock, hang_seconds: float, ours: float
) -> None:
    tail = _tail(run, clock, hang_seconds=hang_seconds)
    _tell(run, "missing_rank", at=clock.now + ours - 0.1)
    assert tail.look() is None
    assert tail.told == []
    _tell(run, "missing_rank", "ours", at=clock.now + ours + 0.1)
    assert tail.look() is None
    assert [finding.sentence for finding in tail.told] == ["ours"]


def test_without_a_dead_rank_the_others_hang_where_nothing_else_ends_them(run: RunDirectory, clock: _Clock) -> None:
    """One that has ended with exit code 0 is no failure to its agent."""
    tail = _tail(run, clock)
    _tell(run, "missing_rank", state="dead")
    assert tail.look() is None
    assert len(tail.told) == 1
    clock.now += 10.0
    assert tail.look() is not None


def test_half_a_line_is_read_once_it_is_whole_and_rubbish_is_passed_over(run: RunDirectory, clock: _Clock) -> None:
    tail = _tail(run, clock)
    path = run.root / "fabric" / "findings.jsonl"
    _tell(run, "missing_rank")
    line = path.read_text()
    path.write_text("{rubbish\n" + line[:20])
    assert tail.look() is None
    path.write_text("{rubbish\n" + line)
    assert tail.look() is None
    clock.now += 10.0
    assert tail.look() is not None


def test_ranks_that_all_move_do_not_hang_though_no_step_is_recorded(run: RunDirectory, clock: _Clock) -> None:
    tail = _tail(run, clock)
    _tell(run, "missing_rank")
    assert tail.look() is None
    clock.now += 11.0
    _watch(run, [0.5, 3.0], updated=clock.now)
    assert tail.look() is None
    clock.now += 100.0
    assert tail.look() is None


def test_one_rank_that_does_not_move_is_enough_for_a_hang(run: RunDirectory, clock: _Clock) -> None:
    tail = _tail(run, clock)
    _tell(run, "missing_rank")
    assert tail.look() is None
    clock.now += 11.0
    _watch(run, [0.5, 21.0], updated=clock.now)
    assert tail.look() is not None


def test_a_watch_that_is_silent_does_not_vouch_for_ranks(run: RunDirectory, clock: _Clock) -> None:
    tail = _tail(run, clock)
    _tell(run, "missing_rank")
    assert tail.look() is None
    _watch(run, [0.5, 0.5], updated=clock.now)
    clock.now += 11.0
    assert tail.look() is not None


def test_a_rank_that_works_gets_longer(run: RunDirectory, clock: _Clock) -> None:
    tail = _tail(run, clock)
    _tell(run, "missing_rank", state="working")
    assert tail.look() is None
    clock.now += 79.0
    assert tail.look() is None
    clock.now += 1.5
    assert tail.look() is not None


def test_where_ranks_are_is_not_told_of_an_earlier_attempt_nor_without_a_watch(run: RunDirectory) -> None:
    assert watched_ranks(run.root, since=0.0) == {}
    _watch(run, [0.5, 3.0], updated=1000.0)
    assert watched_ranks(run.root, since=1000.5) == {}
    assert watched_ranks(run.root, since=999.0)[1].doing == "all_reduce on dp"
    (run.root / "fabric" / "watch.json").write_text("{")
    assert watched_ranks(run.root, since=0.0) == {}
