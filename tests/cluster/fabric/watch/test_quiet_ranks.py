"""Ranks that wait in native code look like ranks that work: their calls alone tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cluster.fabric.watch.hang import Patience, find_hangs
from tests.cluster.fabric.watch.states import LOOP, play
from tests.cluster.fabric.watch.test_head import _Run


def _frozen(run: _Run, seconds: int) -> None:
    """Rank 2 is stopped, and nobody else looks as if it waited."""
    programs = {rank: list(LOOP) * 4 for rank in range(4)}
    del programs[2][-4:]
    run.report()
    start = run.now
    asked = False
    for _ in range(seconds):
        quiet = run.now + 1.0 - start
        still = {"quiet_s": quiet, "activity": "working"}
        stopped = {"life": "stopped", "life_s": quiet, "quiet_s": quiet, "activity": "idle"}
        run.report(**{f"r{rank}": stopped if rank == 2 else still for rank in range(4)})
        if "ask" in run.orders and not asked:
            asked = True
            run.tell_calls(play(programs, waited_s=run.now - start))


def test_a_stopped_rank_is_named_though_nobody_is_seen_to_wait(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    _frozen(run, 12)
    (finding,) = run.findings
    assert (finding.kind, finding.ranks, finding.evidence["state"]) == ("missing_rank", (2,), "stopped")


def test_ranks_that_compute_for_long_are_asked_seldom(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    run.report()
    for second in range(1, 61):
        run.report(**{f"r{rank}": {"quiet_s": float(second), "activity": "working"} for rank in range(4)})
    assert 4 <= run.orders.count("ask") <= 8
    assert run.findings == []


def test_a_rank_that_was_stopped_and_goes_on_is_given_time() -> None:
    programs = {rank: list(LOOP) * 4 for rank in range(4)}
    del programs[2][-4:]
    states = play(programs, waited_s=13.0)
    patience = Patience(hang_seconds=8.0)
    assert [finding.ranks for finding in find_hangs(states, patience)] == [(2,)]
    again = {**states, 2: replace(states[2], life_s=0.4)}
    assert find_hangs(again, patience) == ()
