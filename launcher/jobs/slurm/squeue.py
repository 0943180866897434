"""What SLURM's queue says of jobs: one call for all of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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


def jobs_in_queue(job_ids: Sequence[str], *, timeout_s: float = TIMEOUT_SECONDS) -> Mapping[str, QueuedJob] | None:
    """Those of the jobs that wait or run. None where the queue cannot be asked here, or does not answer in time."""
    lines = _ask(f"--jobs={','.join(job_ids)}", "--format=%i|%T|%r", timeout_s=timeout_s) if job_ids else None
    if lines is None:
        return None
    jobs = {}
    for line in lines:
        job_id, _, rest = line.strip().partition("|")
        state, _, reason = rest.partition("|")
        if job_id in job_ids and state:
            jobs[job_id] = QueuedJob(state=state, reason="" if reason in ("", "None") else reason)
    return jobs


def jobs_of_script(script: Path, *, timeout_s: float) -> Mapping[str, QueuedJob] | None:
    """The same of the user's own jobs that run this batch script, by their ids."""
    lines = _ask("--me", "--format=%i|%T|%r|%o", timeout_s=timeout_s)
    if lines is None:
        return None
    jobs = {}
    for line in lines:
        job_id, state, reason, path = (line.strip().split("|", 3) + [""] * 3)[:4]
        if job_id.isdecimal() and os.path.realpath(path) == os.path.realpath(script):
            jobs[job_id] = QueuedJob(state=state, reason="" if reason in ("", "None") else reason)
    return jobs


def _ask(*options: str, timeout_s: float) -> list[str] | None:
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", *options]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # SLURM forgets a job some minutes after its end; asked for such a one alone, squeue fails.
    if asked.returncode != 0 and "invalid job id" not in asked.stderr.lower():
        return None
    return asked.stdout.splitlines()
