"""Whether a run may be launched: nobody trains it, and no job of it waits or runs in SLURM's queue."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TypeVar

from launcher.errors import RunError
from launcher.jobs.job_record import JobFolder, JobRecord
from launcher.jobs.slurm.squeue import TIMEOUT_SECONDS, QueuedJob, jobs_in_queue, jobs_of_script
from launcher.run_lock import LOCK_NAME, is_held
from megamodel.train.run_directory import RunDirectory

_ASK_SECONDS = 30.0
"""For a busy controller to tell of the queue."""
_AGAIN_SECONDS = 1.0
T = TypeVar("T")


def check_is_free(run: RunDirectory) -> str | None:
    """Raises RunError where the run trains, or is about to, or where nobody knows. Returns the id of a job of it that is just
    ending, if any: the next one must start after it."""
    folder = JobFolder(run)
    record, state = folder.read_record(), folder.read_state()
    has_ended = state is not None and state.state in ("finished", "failed")
    if record is not None and record.backend == "slurm":
        found = _job_in_queue(folder, record, has_ended)
        if found is not None:
            job_id, queued = found
            if has_ended and not queued.waits:
                return job_id
            raise RunError(
                f"run {run.root.name} is job {job_id} in SLURM's queue already ({queued.state}): "
                f"`mega status {run.root}` tells more, `mega cancel {run.root}` ends it"
            )
    if is_held(run.root):
        raise RunError(
            f"run {run.root.name} is being trained by {_holder(run)}: stop it (`mega cancel {run.root}` where it was launched), "
            "or set run.name"
        )
    return None


def find_submitted(folder: JobFolder, known: Collection[str]) -> str | None:
    """The job of the folder's script that is in the queue, other than the `known` ones; waits for SLURM to tell of it."""
    return _asked_again(lambda seconds: _newest(folder, known, seconds), _ASK_SECONDS)


def _job_in_queue(folder: JobFolder, record: JobRecord, has_ended: bool) -> tuple[str, QueuedJob] | None:
    """Raises RunError where that is not known, though it matters."""
    seconds = TIMEOUT_SECONDS if has_ended else _ASK_SECONDS
    job_id = record.job_id
    jobs = _asked_again(lambda left: _jobs_of(folder, record, left), seconds)
    if jobs is None:
        if has_ended or shutil.which("squeue") is None:
            return None
        which = "a job of it may be" if job_id is None else f"it was job {job_id}, which may still be"
        raise RunError(
            f"run {folder.root.parent.name}: {which} in SLURM's queue, and squeue does not tell (asked for {seconds:g} s): "
            f"launch again when it does. Where you know that there is none, remove {folder.root / 'job.json'}"
        )
    if job_id is None and jobs:
        job_id = max(jobs, key=int)
        folder.write_record(replace(record, job_id=job_id))
    return (job_id, jobs[job_id]) if job_id is not None and job_id in jobs else None


def _jobs_of(folder: JobFolder, record: JobRecord, seconds: float) -> Mapping[str, QueuedJob] | None:
    if record.job_id is not None:
        return jobs_in_queue([record.job_id], timeout_s=seconds)
    # sbatch did not tell its number.
    jobs = jobs_of_script(folder.script, timeout_s=seconds)
    return None if jobs is None else {each: job for each, job in jobs.items() if each not in record.earlier_job_ids}


def _newest(folder: JobFolder, known: Collection[str], seconds: float) -> str | None:
    jobs = jobs_of_script(folder.script, timeout_s=seconds) or {}
    return max((job_id for job_id in jobs if job_id not in known), key=int, default=None)


def _asked_again(ask: Callable[[float], T | None], seconds: float) -> T | None:
    """What `ask` returns once it is not None; it is told how long it may take."""
    deadline = time.monotonic() + seconds
    while shutil.which("squeue") is not None and (left := deadline - time.monotonic()) > 0.0:
        if (answer := ask(left)) is not None:
            return answer
        time.sleep(min(_AGAIN_SECONDS, left))
    return None


def _holder(run: RunDirectory) -> str:
    with contextlib.suppress(OSError):
        return (run.root / LOCK_NAME).read_text(encoding="utf-8", errors="replace").strip() or "another process"
    return "another process"
