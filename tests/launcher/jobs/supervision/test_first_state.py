"""A supervisor that goes on where another one was lost."""

from __future__ import annotations

from pathlib import Path

from launcher.jobs.job_record import SupervisorState
from tests.launcher.jobs.made_up_hosts import MadeUpJob


def test_a_supervisor_that_takes_over_tells_of_the_loss_of_the_one_before(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["b"], "")
    job.backend.is_restart = True
    hosts = ("b", "n7.cluster")
    left = job.folder.write_state(
        SupervisorState(state="running", host="n7", pid=1, updated=0.0, attempt=4, hosts=hosts)
    )
    assert job.supervise().exit_code == 0
    (failure,) = job.events("failure")
    assert (failure["kind"], failure["host"], failure["attempt"]) == ("host_lost", "n7.cluster", 4)
    assert failure["at"] == left.updated
    cause = "the supervisor of attempt 4 was lost, on host n7"
    assert failure["message"] == job.events("restart")[0]["reason"] == cause
    assert failure["time"] <= job.events("launch")[0]["time"]


def test_a_start_after_a_requeue_counts_as_a_restart_of_the_job(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["b"], "")
    job.backend.is_restart = True
    job.folder.write_state(
        SupervisorState(state="queued", host="b", pid=1, updated=0.0, attempt=2, restarts=1, requeues=1)
    )
    assert job.supervise().exit_code == 0
    assert (job.state().restarts, job.state().attempt) == (2, 1)
    assert job.events("failure") == []
