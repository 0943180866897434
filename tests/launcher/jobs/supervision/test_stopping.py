"""How long ranks may save once the scheduler wants its hosts back, and that the job is queued again in time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.launcher.jobs.made_up_hosts import MadeUpJob, is_running

# Saves for as long as the test wants.
_SAVES_LONG = """
arrived = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: arrived.append(number))
mark("training")
while not arrived:
    time.sleep(0.01)
mark("saving")
wait_for("go")
checkpoint(7)
sys.exit(75)
"""


def _job(tmp_path: Path, *, ends_in: float, launch: str = "save_seconds = 0.2") -> MadeUpJob:
    job = MadeUpJob(tmp_path, ["a"], _SAVES_LONG, launch=launch)
    job.backend.ends_in = ends_in
    return job


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_save_may_take_as_long_as_the_scheduler_gives_it(tmp_path: Path, number: signal.Signals) -> None:
    job = _job(tmp_path, ends_in=120.0)
    job.backend.preempted = True

    async def stop() -> None:
        await job.wait_for("training-0-1")
        os.kill(os.getpid(), number)
        await job.wait_for("saving-0-1")
        time.sleep(1.0)  # far more than launch.save_seconds, which is for other stops
        (job.root / "go").touch()

    end = job.supervise(stop)
    assert (end.exit_code, end.requeued) == (75, True)
    assert str(end.cause).endswith("; saved at step 7: the same command continues")


@pytest.mark.parametrize("who_is_told", ["the supervisor", "ranks"])
def test_the_job_is_queued_again_before_its_time_is_over_and_ranks_go_on_saving(
    tmp_path: Path, who_is_told: str
) -> None:
    job = _job(tmp_path, ends_in=1.0)
    job.backend.preempted = True
    told_at: list[float] = []

    async def stop() -> None:
        await job.wait_for("training-0-1")
        told_at.append(time.time())
        if who_is_told == "ranks":
            job.backend.agents["a"].signal(signal.SIGTERM)
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        await job.until(lambda: not job.state().hosts and job.state().state == "queued")
        assert is_running(job.pid(0))
        assert job.state().cause == "preempted; its ranks still saved when its time was over"
        (job.root / "go").touch()

    end = job.supervise(stop)
    assert (end.exit_code, end.requeued) == (75, True)
    assert end.cause == job.state().cause == "preempted; saved at step 7: the same command continues"
    assert job.backend.requeues == [{"without": (), "reason": "preemption"}]
    (requeue,) = job.events("requeue")
    assert requeue["time"] - told_at[0] >= 0.7
    assert (job.state().state, job.state().requeues, job.state().attempts_without_progress) == ("queued", 1, 0)


def test_a_start_that_may_never_tell_how_its_save_ended_has_counted_itself(tmp_path: Path) -> None:
    job = _job(tmp_path, ends_in=0.1)

    async def stop() -> None:
        await job.wait_for("training-0-1")
        os.kill(os.getpid(), signal.SIGUSR1)
        await job.until(lambda: bool(job.state().attempts_without_progress))
        assert (job.state().state, job.state().hosts) == ("queued", ())
        (job.root / "go").touch()

    assert job.supervise(stop).requeued
    assert job.state().attempts_without_progress == 0  # it has saved after all
    job.script = job.script.replace("checkpoint(7)", "")
    job.backend.preempted = True
    end = job.supervise(_usr1_again(job))
    assert (end.requeued, job.state().attempts_without_progress) == (True, 1)


def _usr1_again(job: MadeUpJob):  # type: ignore[no-untyped-def]
    async def stop() -> None:
        (job.root / "go").unlink()
        await job.wait_for("training-0-2")
        os.kill(os.getpid(), signal.SIGUSR1)
        await job.until(lambda: bool(job.state().attempts_without_progress))
        (job.root / "go").touch()

    return stop


def test_where_the_job_is_not_queued_again_ranks_are_ended_before_the_scheduler_does(tmp_path: Path) -> None:
    job = _job(tmp_path, ends_in=1.0)
    job.backend.accepts_requeue = False
    states: list[str] = []

    async def requeue(*, without: Sequence[str], reason: str) -> bool:
        states.append(job.state().state)
        return False

    async def stop() -> None:
        await job.wait_for("training-0-1")
        os.kill(os.getpid(), signal.SIGUSR1)

    job.backend.requeue = requeue  # type: ignore[method-assign]
    end = job.supervise(stop)
    assert (end.exit_code, end.requeued, states) == (1, False, ["queued"])
    assert "ended before a checkpoint was saved" in str(end.cause)
    assert (job.state().state, job.state().requeues) == ("failed", 0)
    assert not any(map(is_running, job.pids()))


def test_a_warning_that_is_not_of_the_time_limit_gives_the_time_of_one(tmp_path: Path) -> None:
    job = _job(tmp_path, ends_in=1e7, launch="save_seconds = 0.2\n[slurm]\nsignal_seconds = 5")
    told_at: list[float] = []

    async def stop() -> None:
        await job.wait_for("training-0-1")
        told_at.append(time.time())
        os.kill(os.getpid(), signal.SIGUSR1)
        await job.until(lambda: bool(job.backend.requeues))
        (job.root / "go").touch()

    assert job.supervise(stop).requeued
    assert 3.0 < job.events("requeue")[0]["time"] - told_at[0] < 60.0


def test_a_cancelled_job_is_not_queued_again_while_its_ranks_save(tmp_path: Path) -> None:
    job = _job(tmp_path, ends_in=0.5)

    async def stop() -> None:
        await job.wait_for("training-0-1")
        os.kill(os.getpid(), signal.SIGUSR1)
        await job.wait_for("saving-0-1")
        job.folder.ask_to_cancel()

    end = job.supervise(stop)
    assert (end.requeued, job.backend.requeues, job.state().state) == (False, [], "failed")
