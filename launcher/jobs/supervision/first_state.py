"""What a supervisor knows at its start: at a job's first nothing, later what an earlier supervisor has left."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, replace
from typing import Any

from launcher.jobs.agents.host_names import find_host
from launcher.jobs.job import Job
from launcher.jobs.job_record import JobState, SupervisorState
from launcher.jobs.supervision.attempt_end import Failure
from launcher.jobs.supervision.progress import newest_checkpoint


@dataclass(frozen=True, kw_only=True)
class FirstState:
    """Where a supervisor begins."""

    state: SupervisorState
    loss: Failure | None = None
    """That of the supervisor before, which could not write it down, where the job goes on by itself."""


def first_state(job: Job) -> FirstState:
    """Reads the job's folder, and forgets what belongs to a job that has ended for good."""
    earlier = job.folder.read_state()
    newest = newest_checkpoint(job.run, known=0 if earlier is None else earlier.last_checkpoint)
    now: dict[str, Any] = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "updated": time.time(),
        "last_checkpoint": newest,
        "hosts": (),
    }
    if earlier is None:
        excluded = job.folder.excluded_hosts() if job.backend.name == "slurm" else {}
        return FirstState(state=SupervisorState(state="running", excluded_hosts=excluded, **now))
    state: JobState = "restarting" if earlier.attempt else "running"
    if earlier.state in ("failed", "finished"):
        # Somebody wants it all the same, as by `sbatch` with its script: that counts more than what ended it. But a scheduler
        # may have queued it again by itself, or another host taken it over, while `mega cancel` ended it: then the user's word
        # stands.
        if earlier.state == "finished" or not job.backend.is_restart:
            job.folder.forget_cancel()
        return FirstState(state=replace(earlier, **now, state=state, attempts_without_progress=0, cause=None))
    loss = None
    count, cause = earlier.attempts_without_progress, earlier.cause
    if earlier.hosts:  # it has not seen the end of its last attempt
        count += 1
        cause = f"the supervisor of attempt {earlier.attempt} was lost, on host {earlier.host}"
        if job.backend.is_restart:  # else nobody knows for how long nobody wanted it
            host = find_host(earlier.host, (), earlier.hosts) or earlier.host
            loss = Failure(kind="host_lost", message=cause, at=earlier.updated, host=host)
    if newest > earlier.last_checkpoint:
        count = 0
    state_now = replace(earlier, **now, state=state, attempts_without_progress=count, cause=cause)
    return FirstState(state=state_now, loss=loss)
