"""A run's records: what is dropped when a run continues from a checkpoint, and what that tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamodel.train.run_directory import LostSteps, RunDirectory


def with_steps(root: Path, *steps: int) -> RunDirectory:
    """A run whose steps took 2 s, the save before each 0.5 s, and ended at 1000 s + 10 s a step; validated at step 4."""
    run = RunDirectory(root)
    for step in steps:
        line = {"time": 1000.0 + 10 * step, "step": step, "loss": 1.0, "step_time_s": 2.0, "save_s": 0.5}
        run.append_metrics({**line, "expert_counts": [[1, 2]]})
        if step == 4:
            run.append_metrics({"time": 1043.0, "step": 4, "val_loss": 1.0, "validation_s": 3.0})
    return run


def steps_of(run: RunDirectory) -> list[int]:
    return [line["step"] for line in run.read_metrics()]


def test_what_is_beyond_the_checkpoint_is_dropped_and_told(tmp_path: Path) -> None:
    run = with_steps(tmp_path, *range(1, 7))
    before = run.metrics.read_bytes()
    lost = run.forget_metrics_after(3)
    assert lost == LostSteps(
        from_step=6, to_step=3, lost_steps=3, lost_seconds=3 * 2.5 + 3.0, since=1040.0 - 2.5, until=1060.0
    )
    assert steps_of(run) == [1, 2, 3]
    assert before.startswith(run.metrics.read_bytes())  # kept lines are as they were, to the byte
    run.append_metrics({"step": 4, "loss": 1.0})
    assert steps_of(run) == [1, 2, 3, 4]


def test_a_validation_belongs_to_its_step(tmp_path: Path) -> None:
    run = with_steps(tmp_path, 3, 4, 5)
    lost = run.forget_metrics_after(4)
    assert lost is not None
    assert (lost.from_step, lost.lost_steps, lost.lost_seconds) == (5, 1, 2.5)
    assert steps_of(run) == [3, 4, 4]


def test_without_a_checkpoint_everything_is_lost(tmp_path: Path) -> None:
    run = with_steps(tmp_path, 1, 2)
    lost = run.forget_metrics_after(0)
    assert lost is not None
    assert (lost.from_step, lost.to_step, lost.lost_steps) == (2, 0, 2)
    assert run.metrics.read_bytes() == b""


def test_where_nothing_is_beyond_nothing_is_lost(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path / "new").forget_metrics_after(0) is None
    run = with_steps(tmp_path, 1, 2)
    before = run.metrics.read_bytes()
    assert run.forget_metrics_after(2) is None
    assert run.metrics.read_bytes() == before


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3, "loss": 1.0}\n{"st', b"\x00\x00\x00"])
def test_half_a_line_goes_with_what_was_lost(tmp_path: Path, torn: bytes) -> None:
    run = with_steps(tmp_path, 1, 2)
    before = run.metrics.read_bytes()
    with run.metrics.open("ab") as file:
        file.write(torn)
    lost = run.forget_metrics_after(2)
    assert (0 if lost is None else lost.lost_steps) == torn.count(b"loss")
    assert run.metrics.read_bytes() == before


def test_the_newest_metrics_come_first(tmp_path: Path) -> None:
    assert [line["step"] for line in with_steps(tmp_path, 1, 2, 3).newest_metrics()] == [3, 2, 1]


def test_each_record_has_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 17.5)
    run = RunDirectory(tmp_path)
    run.append_metrics({"step": 1})
    run.append_event("start", step=0)
    assert list(run.read_metrics()) == [{"time": 17.5, "step": 1}]
    assert list(run.read_events()) == [{"time": 17.5, "event": "start", "step": 0}]
