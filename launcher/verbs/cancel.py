"""`mega cancel`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.errors import RunError
from launcher.output import Output
from launcher.rank_process import EXIT_STOPPED
from launcher.verbs.generate import Run

if TYPE_CHECKING:
    from launcher.jobs.job_record import JobFolder, JobRecord, SupervisorState
    from launcher.jobs.slurm.squeue import QueuedJob

# What scancel says of a job that is not to be started again anyway.
_IS_OVER = "already completing or completed"

Now = Annotated[bool, typer.Option("--now", help="End it at once, without saving.")]


@dataclass(frozen=True, kw_only=True)
class _Done:
    """What was done."""

    action: str
    """stops: it saves, then ends. killed: it does not save. dequeued: it had not begun, or was about to begin again."""
    sentence: str


def cancel(out: Output, run: Run, now: Now = False) -> int:
    """End a launched run for good: it saves first. The same `mega launch` continues it."""
    from launcher.jobs.job_record import JobFolder
    from launcher.run_record import find_run

    directory = find_run(run, launched=True)
    folder = JobFolder(directory)
    record, state = folder.read_record(), folder.read_state()
    if record is None:
        raise RunError(
            f"{directory.root}: was not started by `mega launch`; Ctrl-C or SIGTERM where `mega train` runs saves and ends it"
        )
    if record.backend == "slurm" and record.job_id is None:
        from launcher.jobs.inspection.status import UNCONFIRMED

        raise RunError(f"{directory.root}: {UNCONFIRMED}. `squeue --me` and scancel see to it else")
    done = _in_queue(folder, record, now) if record.job_id is not None else _process(folder, record, state, now)
    out.say(done.sentence)
    out.result({"run_dir": str(directory.root), "job_id": record.job_id, "action": done.action})
    return 0


def _in_queue(folder: JobFolder, record: JobRecord, now: bool) -> _Done:
    from launcher.jobs.slurm.client import NoAnswerError
    from launcher.jobs.slurm.squeue import jobs_in_queue

    job_id = record.job_id
    assert job_id is not None
    jobs = jobs_in_queue([job_id])
    if jobs is None:
        raise RunError(f"job {job_id}: SLURM's queue cannot be asked here (squeue); run this where jobs are submitted")
    state = folder.read_state()
    has_ended = state is not None and state.state in ("finished", "failed")
    if (job := jobs.get(job_id)) is None or (job.state == "COMPLETING" and has_ended):
        raise RunError(f"job {job_id} is not running any more: there is nothing to cancel")
    was_asked = folder.is_cancelled()
    folder.ask_to_cancel()
    try:
        return _tell_slurm(folder, job_id, job, state, now)
    except NoAnswerError as error:
        raise RunError(f"{error}; SLURM may have heard it, so the run stays marked as cancelled: try again") from error
    except RunError:
        if not was_asked:  # else the job would take a later preemption for the end
            folder.forget_cancel()
        raise


def _tell_slurm(folder: JobFolder, job_id: str, job: QueuedJob, state: SupervisorState | None, now: bool) -> _Done:
    if job.state == "COMPLETING":
        return _at_its_end(folder, job_id, state)
    if job.waits:
        _scancel(job_id)
        _note_end(folder, "cancelled before it was started" if state is None else "cancelled while it waited")
        return _Done(action="dequeued", sentence=f"Job {job_id} waited in the queue, and is taken out of it.")
    if now:
        _scancel(job_id)
        return _Done(action="killed", sentence=f"Job {job_id} is told to end at once; its last checkpoint stays.")
    _scancel("--signal=TERM", "--batch", job_id)
    return _Done(
        action="stops",
        sentence=f"Job {job_id} is asked to save and end; `mega status` tells when it has. --now ends it at once.",
    )


def _at_its_end(folder: JobFolder, job_id: str, state: SupervisorState | None) -> _Done:
    """A job that SLURM is to start again looks like one that is over until its processes have ended."""
    try:
        _scancel(job_id)
    except RunError as error:
        if _IS_OVER not in str(error):
            raise
    if state is None or state.state == "queued":  # else its supervisor still lives, and says itself how it ends
        _note_end(folder, "cancelled before it was started again")
    return _Done(action="dequeued", sentence=f"Job {job_id} is just ending, and is not started again.")


def _scancel(*arguments: str) -> None:
    from launcher.jobs.slurm.client import NoAnswerError, call

    answer = asyncio.run(call("scancel", *arguments))
    if answer.code:
        kind = NoAnswerError if answer.is_lost else RunError
        raise kind(f"scancel {' '.join(arguments)}: {answer.complaint}")


def _process(folder: JobFolder, record: JobRecord, state: SupervisorState | None, now: bool) -> _Done:
    """The supervisor is a process of the host where `mega launch` runs."""
    if state is None or state.state in ("finished", "failed"):
        how = "has not begun" if state is None else f"has ended ({state.state})"
        raise RunError(f"{folder.root.parent}: this job {how}: there is nothing to cancel")
    if state.host != socket.gethostname():
        raise RunError(
            f"{folder.root.parent}: its supervisor is process {state.pid} on {state.host}: run `mega cancel` there"
        )
    if not _is_supervisor(state):
        raise RunError(
            f"{folder.root.parent}: its supervisor, process {state.pid} on this host, is gone: there is nothing to cancel"
        )
    folder.ask_to_cancel()
    with contextlib.suppress(ProcessLookupError):
        os.kill(state.pid, signal.SIGKILL if now else signal.SIGTERM)
    if now:  # it cannot say so itself; its ranks end when they have lost it
        _note_end(folder, "cancelled at once")
        if record.backend == "torchrun":  # else its other hosts would go on, or wait for it
            folder.end.write_text(f"{EXIT_STOPPED}\n", encoding="utf-8")
        return _Done(
            action="killed", sentence=f"Process {state.pid} is killed, and its ranks end; the last checkpoint stays."
        )
    return _Done(
        action="stops",
        sentence=f"Process {state.pid} is asked to save and end; `mega status` tells when it has. --now ends it at once.",
    )


def _is_supervisor(state: SupervisorState) -> bool:
    """Whether the process of that number still is the one that wrote the state."""
    import psutil

    try:
        process = psutil.Process(state.pid)
        words = process.cmdline()
        return (
            process.status() != psutil.STATUS_ZOMBIE
            and process.create_time() <= state.updated
            and any(word in ("launch", "supervise") for word in words)
        )
    except psutil.Error:
        return False


def _note_end(folder: JobFolder, cause: str) -> None:
    from launcher.jobs.job_record import SupervisorState

    state = folder.read_state() or SupervisorState(
        state="failed", host=socket.gethostname(), pid=0, updated=time.time()
    )
    folder.write_state(replace(state, state="failed", cause=cause, hosts=()))
