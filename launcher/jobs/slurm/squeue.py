"""What SLURM's queue says of jobs: one call for all of them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """A job that SLURM has not done with."""

    state: str
    """PENDING, RUNNING, COMPLETING, ..."""
    reason: str
    """Why it waits, where it does: Resources, Priority, BeginTime, ..."""

    @property
    def waits(self) -> bool:
        """Whether it has no hosts now, and may get some."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")


def jobs_in_queue(job_ids: Sequence[str]) -> Mapping[str, QueuedJob] | None:
    """Those of the jobs that wait or run. None where the queue cannot be asked here, or does not answer in time."""
    if not job_ids or shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", f"--jobs={','.join(job_ids)}", "--format=%i|%T|%r"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # SLURM forgets a job some minutes after its end; asked for such a one alone, squeue fails.
    if asked.returncode != 0 and "invalid job id" not in asked.stderr.lower():
        return None
    jobs = {}
    for line in asked.stdout.splitlines():
        job_id, _, rest = line.strip().partition("|")
        state, _, reason = rest.partition("|")
        if job_id in job_ids and state:
            jobs[job_id] = QueuedJob(state=state, reason="" if reason in ("", "None") else reason)
    return jobs
