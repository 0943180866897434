"""The guard of a job whose first host dies."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.jobs.slurm.guard import guard, guard_command
from megamodel.train.run_directory import RunDirectory
from tests.launcher.jobs.fake_slurm import RUNNING_JOB, FakeSlurm

_LOST = {"NodeList": "n[2-4]"}


class Looks:
    """Stands for the time between two looks: what happens in it."""

    def __init__(self, *between: Callable[[], object]) -> None:
        self.between = list(between)
        self.seconds: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.between.pop(0)()  # one look too many is an IndexError


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def watch(run: RunDirectory, looks: Looks, *, max_restarts: int = 3) -> list[str]:
    said: list[str] = []
    work = guard("7", run=run, max_restarts=max_restarts, say=said.append, sleep=looks.sleep)
    asyncio.run(asyncio.wait_for(work, 60))
    assert looks.between == []
    return said


def events(run: RunDirectory) -> list[dict[str, object]]:
    return [json.loads(line) for line in run.events.read_text().splitlines()] if run.events.exists() else []


def test_a_job_without_its_first_host_is_queued_again(fake_slurm: FakeSlurm, run: RunDirectory) -> None:
    fake_slurm.job()
    looks = Looks(lambda: None, lambda: fake_slurm.job(**_LOST))
    said = watch(run, looks)
    assert fake_slurm.calls()[-1] == "scontrol requeue 7"
    assert len(fake_slurm.calls()) == 3
    assert said == ["host n1 is lost, and the supervisor of the job with it: the job is queued again"]
    (event,) = events(run)
    assert (event["event"], event["reason"], event["host"]) == ("requeue", "host_lost", "n1")
    assert all(5 < seconds < 20 for seconds in looks.seconds)


def test_a_loss_of_another_host_is_the_supervisors_matter(fake_slurm: FakeSlurm, run: RunDirectory) -> None:
    fake_slurm.job(NodeList="n[1,3-4]")
    watch(run, Looks(lambda: None, lambda: fake_slurm.job(NodeList="n[1,3-4]", JobState="COMPLETED")))
    assert not any("requeue" in call for call in fake_slurm.calls())


def test_a_job_that_ends_is_left_alone(fake_slurm: FakeSlurm, run: RunDirectory) -> None:
    fake_slurm.job(JobState="COMPLETING", **_LOST)
    watch(run, Looks(lambda: None, lambda: fake_slurm.job(JobState="CANCELLED", **_LOST)))
    assert not any("requeue" in call for call in fake_slurm.calls())


def test_a_job_that_must_not_be_queued_again_ends(fake_slurm: FakeSlurm, run: RunDirectory) -> None:
    fake_slurm.job(**_LOST, Restarts="3")
    said = watch(run, Looks(lambda: None))
    assert fake_slurm.calls()[-1] == "scancel 7"
    assert "must not be queued again" in said[0]
    assert events(run) == []


def test_another_guard_was_faster(fake_slurm: FakeSlurm, run: RunDirectory) -> None:
    fake_slurm.job(**_LOST)
    fake_slurm.program(
        "scontrol",
        '[ "$1" = requeue ] && { echo "Job is pending execution for job 7" >&2; exit 1; }; cat "$FAKE/job"',
    )
    assert watch(run, Looks(lambda: None))[0].endswith("Job is pending execution for job 7")
    assert events(run) == []


def test_a_silent_controller_is_asked_again(fake_slurm: FakeSlurm, run: RunDirectory) -> None:
    fake_slurm.program("scontrol", "echo Unable to contact slurm controller >&2; exit 1")
    said = watch(run, Looks(lambda: None, lambda: fake_slurm.job(RUNNING_JOB, **_LOST)))
    assert said[0] == "job 7: Unable to contact slurm controller"
    assert fake_slurm.calls()[-1] == "scontrol requeue 7"


def test_it_writes_down_what_it_did_although_a_requeue_ends_it_too(fake_slurm: FakeSlurm, run: RunDirectory) -> None:
    fake_slurm.job(**_LOST)
    fake_slurm.program("scontrol", '[ "$1" = requeue ] && kill -TERM $PPID && sleep 0.2; cat "$FAKE/job"')
    command = guard_command(run, max_restarts=3)
    ended = subprocess.run(
        [sys.executable, *command[1:]],
        env={**os.environ, "SLURM_JOB_ID": "7", "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    (event,) = events(run)
    assert event["event"] == "requeue"
