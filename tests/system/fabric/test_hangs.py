"""Real ranks that hang, on two hosts by name: the watch names the rank and the collective, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.system.fabric.hangs import HangCase, HangFault, HangOutcome, is_named, run_hang

HANG_SECONDS = 3.0


@pytest.fixture(autouse=True)
def _one_thread_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def _outcome(case: HangCase, directory: Path) -> HangOutcome:
    outcome = run_hang(case, directory, patience_s=180.0)
    assert outcome.orphans == ()
    assert not list(directory.glob("fabric/watcher-*.log")), "a watcher complained"
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank", "slot"),
    [
        ("skipped", 2, 1),
        ("skipped", 1, 0),
        ("different", 3, 2),
        ("stopped", 0, 0),
        ("stopped", 3, 1),
        ("asleep", 1, 3),
        ("interpreter held", 2, 5),
    ],
)
def test_a_hang_is_named_with_the_stacks_of_all_ranks(tmp_path: Path, fault: HangFault, rank: int, slot: int) -> None:
    case = HangCase(fault=fault, rank=rank, slot=slot, hang_seconds=HANG_SECONDS)
    outcome = _outcome(case, tmp_path)
    told = [each.finding.sentence for each in outcome.findings]
    assert is_named(case, outcome), (told, outcome.axis, outcome.number)
    assert outcome.ended == ()  # it only reports
    events = [json.loads(line) for line in outcome.events.splitlines()]
    assert events[0]["event"] == "fabric_finding"
    assert events[0]["ranks"] == [rank]
    for other, stack in outcome.stacks.items():
        expected = "the process is stopped" if (fault, other) == ("stopped", rank) else "in _loop"
        assert expected in stack, other
    if fault in ("asleep", "interpreter held"):
        assert "in _do_wrong" in outcome.stacks[rank]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 3])
def test_a_killed_rank_is_named_though_all_others_end_too(tmp_path: Path, rank: int) -> None:
    case = HangCase(fault="killed", rank=rank, slot=0, hang_seconds=HANG_SECONDS)
    outcome = _outcome(case, tmp_path)
    assert is_named(case, outcome), [each.finding.sentence for each in outcome.findings]
    assert len(outcome.findings) == 1  # those whom it took along are not to blame


@pytest.mark.slow
def test_a_rank_that_is_busy_for_long_is_no_hang(tmp_path: Path) -> None:
    case = HangCase(fault="busy", rank=1, step=10, steps=20, seconds=9.0, hang_seconds=HANG_SECONDS)
    outcome = _outcome(case, tmp_path)
    assert outcome.findings == ()
    assert outcome.ended == (0, 1, 2, 3)


@pytest.mark.slow
def test_a_healthy_run_leaves_its_last_state_and_nothing_else(tmp_path: Path) -> None:
    outcome = _outcome(HangCase(fault="none", rank=0, steps=20, hang_seconds=HANG_SECONDS), tmp_path)
    assert outcome.findings == ()
    assert outcome.events == ""
    assert not (tmp_path / "stacks").exists()
    state = json.loads((tmp_path / "fabric" / "watch.json").read_text())
    assert [rank["state"] for rank in state["ranks"]] == ["ended"] * 4
