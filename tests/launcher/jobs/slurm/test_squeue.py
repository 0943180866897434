"""SLURM's queue, by a program on PATH that answers as squeue does."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.jobs.slurm import squeue
from launcher.jobs.slurm.squeue import QueuedJob, jobs_in_queue


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the program; what it is called with goes to `asked`."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def program(folder: Path, body: str) -> None:
    path = folder / "squeue"
    path.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n{body}\n')
    path.chmod(0o755)


def test_what_waits_and_what_runs(fake: Path) -> None:
    program(fake, 'printf "17|PENDING|Resources\\n18|RUNNING|None\\n99|RUNNING|None\\n"')
    assert jobs_in_queue(["17", "18", "19"]) == {
        "17": QueuedJob(state="PENDING", reason="Resources"),
        "18": QueuedJob(state="RUNNING", reason=""),
    }
    assert (fake / "asked").read_text() == "--noheader --jobs=17,18,19 --format=%i|%T|%r\n"
    assert QueuedJob(state="PENDING", reason="").waits
    assert not QueuedJob(state="COMPLETING", reason="").waits


def test_a_job_that_is_forgotten_is_gone(fake: Path) -> None:
    program(fake, 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    assert jobs_in_queue(["17"]) == {}


def test_a_queue_that_cannot_answer_tells_nothing(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert jobs_in_queue([]) is None
    program(fake, 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1')
    assert jobs_in_queue(["17"]) is None
    monkeypatch.setattr(squeue, "TIMEOUT_SECONDS", 0.05)
    program(fake, "exec sleep 60")
    assert jobs_in_queue(["17"]) is None


def test_without_slurm_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert jobs_in_queue(["17"]) is None
