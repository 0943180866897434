"""`mega supervise`: not for people. The batch script of a job becomes this."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.errors import RunError
from launcher.output import Output
from launcher.rank_process import EXIT_STOPPED, stop_signals

if TYPE_CHECKING:
    from launcher.jobs.backend import Backend
    from launcher.jobs.config import LaunchConfig
    from launcher.jobs.job import Job, JobEnd
    from launcher.jobs.job_record import JobFolder, JobRecord

RunFolder = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run's folder.")]

_LOCK_SECONDS = 60.0
"""For the start before this one to end, and for the file system to learn that its host is dead, beside what that start itself
may wait for."""
_LOOK_SECONDS = 1.0
_SAY_SECONDS = 60.0
"""Between two words of what is waited for."""


def supervise(out: Output, run: RunFolder) -> int:
    """Stand by a launched run until it has ended. The batch script of `mega launch --on slurm` becomes this itself."""
    with _stop_signals_held():
        return _supervise(run, say=partial(_say, out.say), warn=partial(_say, out.warn))


def _supervise(run: Path, *, say: Callable[[str], None], warn: Callable[[str], None]) -> int:
    from launcher.config import load_run_config
    from launcher.jobs.backends.slurm import SlurmBackend
    from launcher.jobs.job import Job
    from launcher.jobs.job_record import JobFolder
    from launcher.jobs.slurm.step import python_of_ranks
    from megamodel.train.run_directory import RunDirectory

    directory = RunDirectory(run)
    folder = JobFolder(directory)
    config = load_run_config([folder.config]).config
    backend = SlurmBackend(os.environ, config.slurm, directory, say=say, device=config.run.device)
    with contextlib.ExitStack() as held:
        if not _hold(run, held, say, patience_s=_longest_life(config.launch), requeue=partial(_requeue, backend)):
            return EXIT_STOPPED
        _note_job(folder, os.environ["SLURM_JOB_ID"], warn)
        job = Job(
            config_file=folder.config,
            config=config,
            backend=backend,
            ranks_per_host=config.launch.ranks_per_node or 1,
            say=say,
            command=(python_of_ranks(config.slurm.container), "-m", "launcher", "train", str(folder.config)),
        )
        return asyncio.run(_stand_by(job)).exit_code


async def _stand_by(job: Job) -> JobEnd:
    """With the stop signals that have come since this process began."""
    from launcher.jobs.stop_asked import StopAsked
    from launcher.jobs.supervision.supervisor import supervise as run_supervisor

    with StopAsked(job.say) as stop:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())
        return await run_supervisor(job, stop=stop)


@contextlib.contextmanager
def _stop_signals_held() -> Iterator[None]:
    """None of them ends this process before somebody listens: the run would not go on after its time limit."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    try:
        yield
    finally:
        while signal.sigtimedwait(stop_signals(), 0) is not None:
            pass  # this process ends, and is to say why
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _say(write: Callable[[str], None], text: str) -> None:
    """A full disk, on which what is said here stands, ends no job."""
    with contextlib.suppress(OSError):
        write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")


def _note_job(folder: JobFolder, job_id: str, warn: Callable[[str], None]) -> None:
    """`mega launch` knows the job's number only when the job may have begun; and anybody may submit the script again."""
    try:
        record = folder.read_record()
        noted = _with_job(record, job_id)
        if noted != record:
            folder.write_record(noted)
    except OSError as error:  # a full disk ends no job
        warn(f"{folder.root}: that this is job {job_id} cannot be written now ({error}); it goes on")


def _with_job(record: JobRecord | None, job_id: str) -> JobRecord:
    from launcher.jobs.job_record import JobRecord

    if record is None:
        return JobRecord(
            backend="slurm",
            job_id=job_id,
            submitted=time.time(),
            submitted_from=socket.gethostname(),
            nodes=int(os.environ.get("SLURM_JOB_NUM_NODES", 1)),
        )
    if record.job_id == job_id:
        return record
    if record.job_id is None:
        return replace(record, job_id=job_id)
    # `mega launch` has not submitted this one: nobody here knows since when it has waited.
    return replace(
        record, job_id=job_id, submitted=time.time(), earlier_job_ids=(*record.earlier_job_ids, record.job_id)
    )


def _longest_life(launch: LaunchConfig) -> float:
    """Seconds that a supervisor may hold the run whose host SLURM has given up, while it still writes to the run's folder."""
    from launcher.jobs.job import Patience

    its_hosts = launch.lost_host_seconds + launch.start_timeout_seconds + launch.wait_for_hosts_seconds
    return its_hosts + Patience().scheduler + _LOCK_SECONDS


def _requeue(backend: Backend) -> bool:
    return asyncio.run(backend.requeue(without=(), reason="held"))


def _hold(
    run: Path,
    held: contextlib.ExitStack,
    say: Callable[[str], None],
    *,
    patience_s: float,
    requeue: Callable[[], bool],
) -> bool:
    """Holds the run until `held` ends; waits for those who still do. False where they do not let go, and the job was queued
    again instead. Raises RunError where it was not, and where this process is told to end in the meantime."""
    from launcher.run_lock import locked_run

    deadline, say_at = time.monotonic() + patience_s, -math.inf
    while True:
        try:
            held.enter_context(locked_run(run, say=say))
            return True
        except RunError as error:
            # A warning of the time limit, or of preemption, can wait for the supervisor: it has the job started again.
            if told := signal.sigpending() & {signal.SIGTERM, signal.SIGINT}:
                names = " and ".join(signal.Signals(number).name for number in told)
                raise RunError(f"told to end by {names} while waiting for the run: {error}") from error
            is_over, why = time.monotonic() >= deadline, f"{error}"
        if is_over:
            try:
                if requeue():
                    say(f"waited {patience_s:.0f} s: {why}; the job is queued again")
                    return False
            except RunError as error:  # SLURM may answer the next time, or the run be free
                say(f"{error}; still waiting: {why}")
            else:
                raise RunError(why)
        elif time.monotonic() >= say_at:
            say_at = time.monotonic() + _SAY_SECONDS
            left = f"{deadline - time.monotonic():.0f} s, as long as a supervisor whose host is lost may go on"
            say(f"waiting up to {left}: {why}")
        time.sleep(_LOOK_SECONDS)
