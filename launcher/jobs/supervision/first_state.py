"""What a supervisor knows at its start: at a job's first nothing, later what an earlier supervisor has left."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace
from typing import Any

from launcher.jobs.job import Job
from launcher.jobs.job_record import JobState, SupervisorState
from launcher.jobs.supervision.progress import newest_checkpoint


def first_state(job: Job) -> SupervisorState:
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
        return SupervisorState(state="running", **now)
    state: JobState = "restarting" if earlier.attempt else "running"
    if earlier.state in ("failed", "finished"):
        # Somebody wants it all the same, as by `sbatch` with its script: that counts more than what ended it. But a scheduler
        # may have queued it again by itself while `mega cancel` ended it: then the user's word stands.
        if earlier.state == "finished" or not job.backend.is_restart:
            job.folder.forget_cancel()
        return replace(earlier, **now, state=state, attempts_without_progress=0, cause=None)
    count, cause = earlier.attempts_without_progress, earlier.cause
    if earlier.hosts:  # it has not seen the end of its last attempt
        count += 1
        cause = f"the supervisor of attempt {earlier.attempt} was lost, on host {earlier.host}"
    if newest > earlier.last_checkpoint:
        count = 0
    return replace(earlier, **now, state=state, attempts_without_progress=count, cause=cause)
