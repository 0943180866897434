"""A backend within a job of SLURM, for tests of it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from launcher.jobs.backend import AgentsStart
from launcher.jobs.backends.slurm import SlurmBackend
from launcher.jobs.config import SlurmConfig
from launcher.jobs.job_record import JobFolder, SupervisorState
from megamodel.train.run_directory import RunDirectory

T = TypeVar("T")


def run(work: Awaitable[T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(work, 60)

    return asyncio.run(bounded())


class Case:
    """A backend within job 7, in its second start if `restarts` is 1."""

    def __init__(self, folder: Path, config: SlurmConfig | None = None, **environ: str) -> None:
        self.run = RunDirectory(folder / "runs" / "big")
        self.folder = JobFolder(self.run)
        self.folder.root.mkdir(parents=True)
        self.said: list[str] = []
        environ = {**os.environ, "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", **environ}
        self.backend = SlurmBackend(
            environ, config or SlurmConfig(), self.run, say=self.said.append, device="cpu", working_directory=folder
        )

    def has_requeued(self, times: int) -> None:
        """As the supervisor counts, which does so before it asks."""
        state = SupervisorState(state="queued", host="n1", pid=1, updated=0.0)
        self.folder.write_state(replace(state, requeues=times))

    def start(self, hosts: tuple[str, ...] = ("n2", "n3"), agents_per_host: int = 1) -> AgentsStart:
        environ = {"MEGA_ATTEMPT": "4", "MEGA_JOB_TOKEN": "secret"}
        output = self.folder.root / "agents.log"
        return AgentsStart(hosts=hosts, agents_per_host=agents_per_host, environ=environ, output=output)


async def until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
