"""What a run's folder tells of how far it has come."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.jobs.supervision.progress import last_step, newest_checkpoint
from megamodel.train.run_directory import RunDirectory
from parallel.checkpoint.directory import CheckpointDirectory


def _save(run: RunDirectory, step: int) -> None:
    directory = CheckpointDirectory(run.checkpoints)
    directory.begin(step)
    directory.commit(step, world_size=1, metadata={}, files={})


def test_the_newest_complete_checkpoint_counts(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert newest_checkpoint(run) == 0
    _save(run, 10)
    _save(run, 200)
    _save(run, 30)
    CheckpointDirectory(run.checkpoints).begin(400)  # half-done
    (run.checkpoints / "step-00000500").mkdir()  # without a manifest
    assert newest_checkpoint(run) == 200


def test_where_nobody_can_look_now_what_was_known_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path)
    _save(run, 10)
    run.append_metrics({"step": 7})

    def away(path: Path) -> Iterator[Path]:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "iterdir", away)
    assert newest_checkpoint(run, known=9) == 9
    assert newest_checkpoint(run) == 0
    monkeypatch.setattr(Path, "open", lambda path, mode: away(path))
    assert last_step(run, since=0.0) is None


def test_the_last_recorded_step_is_read_from_the_end(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert last_step(run, since=0.0) is None
    for step in range(1, 2001):
        run.append_metrics({"step": step, "words": "x" * 100})
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 2001})[:-1])
    assert last_step(run, since=0.0) == 2000


def test_a_damaged_line_is_passed_over(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.append_metrics({"step": 7})
    with run.metrics.open("a") as file:
        file.write('{"ste\n[]\n{"loss": 1}\n')
    assert last_step(run, since=0.0) == 7


def test_a_line_may_be_of_any_length(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.append_metrics({"step": 7})
    run.append_metrics({"step": 8, "words": "x" * 200_000})
    assert last_step(run, since=0.0) == 8
    run.append_metrics({"words": "x" * 200_000})
    assert last_step(run, since=0.0) == 8


def test_what_an_earlier_start_recorded_is_not_told(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.append_metrics({"step": 7})
    os.utime(run.metrics, (1000.0, 1000.0))
    assert last_step(run, since=1000.5) is None
    assert last_step(run, since=999.5) == 7
