"""Looks after a job of SLURM whose first host may die, and the supervisor with it.

With --no-kill SLURM leaves a job running that has lost its first host: without batch script, and for ever. So a tiny step on
another host asks SLURM now and then, and has such a job queued again, or ends it where it must not be.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from launcher.errors import RunError
from launcher.jobs.slurm.client import JobInfo, call, show_job
from megamodel.train.run_directory import RunDirectory

_INTERVAL_SECONDS = 10.0
"""SLURM itself takes minutes to give a host up, where it is not told otherwise."""
_ENDED = (
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "OUT_OF_MEMORY",
    "DEADLINE",
    "BOOT_FAIL",
)


def guard_command(run: RunDirectory, *, max_restarts: int) -> tuple[str, ...]:
    """Starts the guard. `max_restarts`: of the job, by whomever; 0 has it ended."""
    return (sys.executable, "-m", "launcher.jobs.slurm.guard", str(run.root), str(max_restarts))


async def guard(
    job_id: str,
    *,
    run: RunDirectory,
    max_restarts: int,
    say: Callable[[str], None],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    before_acting: Callable[[], None] = lambda: None,
) -> None:
    """Returns once the job has ended, or has been queued again.

    `before_acting` is called before SLURM is asked for what ends the guard too.
    """
    while True:
        # Several guards of many jobs are not to ask all at once.
        await sleep(_INTERVAL_SECONDS * random.uniform(0.8, 1.2))
        try:
            job = await show_job(job_id)
            if job.state in _ENDED:
                return
            if has_lost_supervisor(job):
                before_acting()
                await _let_go_on(job_id, job, run, max_restarts, say)
                return
        except RunError as error:  # the controller may answer the next time
            say(str(error))


def has_lost_supervisor(job: JobInfo) -> bool:
    """Whether SLURM has given up the host of the batch script, and let the job run on."""
    return job.state == "RUNNING" and bool(job.hosts) and bool(job.batch_host) and job.batch_host not in job.hosts


async def _let_go_on(
    job_id: str, job: JobInfo, run: RunDirectory, max_restarts: int, say: Callable[[str], None]
) -> None:
    message = f"host {job.batch_host} is lost, and the supervisor of the job with it"
    if job.restarts >= max_restarts:
        say(f"{message}; the job must not be queued again, so it ends")
        await call("scancel", job_id)
        return
    answer = await call("scontrol", "requeue", job_id)
    if answer.code == 0:  # else another guard was faster
        run.append_event("requeue", reason="host_lost", without=[], host=job.batch_host)
    say(f"{message}: {'the job is queued again' if answer.code == 0 else answer.complaint}")


def main() -> None:
    """Of the guard's own process."""
    parser = argparse.ArgumentParser(description="Started by a job's supervisor, beside its agents.")
    parser.add_argument("run", type=Path)
    parser.add_argument("max_restarts", type=int)
    arguments = parser.parse_args()
    job_id = os.environ["SLURM_JOB_ID"]
    asyncio.run(
        guard(
            job_id,
            run=RunDirectory(arguments.run),
            max_restarts=arguments.max_restarts,
            say=lambda text: print(text, file=sys.stderr),  # noqa: T201
            # The signal comes with the requeue, seconds before the end: time to write down what was done.
            before_acting=lambda: _ignore(signal.SIGTERM),
        )
    )


def _ignore(number: signal.Signals) -> None:
    """From now on."""
    signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
