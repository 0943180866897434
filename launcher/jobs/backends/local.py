"""This machine alone: one agent, a child process of the supervisor."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping, Sequence

from launcher.jobs.agents.protocol import HOST_NAME
from launcher.jobs.backend import Agents, AgentsStart
from launcher.jobs.backends.starter import Starter

AGENT_COMMAND = (sys.executable, "-m", "launcher", "agent")


class LocalBackend:
    """`launcher.jobs.backend.Backend` on one host, without a queue."""

    name = "local"
    task_per_rank = False
    is_restart = False

    def __init__(self, environ: Mapping[str, str]) -> None:
        """`environ` is that of the agent and of its ranks."""
        self._environ = environ
        self._host = socket.gethostname()

    async def hosts(self) -> Sequence[str]:
        """This one."""
        return (self._host,)

    async def possible_hosts(self) -> Sequence[str]:
        """This one."""
        return (self._host,)

    async def start(self, start: AgentsStart) -> Agents:
        """Starts the agent."""
        # A name that the environment brings along, as in a job of SLURM, need not be this one.
        environ = {**self._environ, HOST_NAME: self._host, **start.environ}
        return Starter.start(AGENT_COMMAND, environ=environ, output=start.output)

    async def requeue(self, *, without: Sequence[str], reason: str) -> bool:
        """There is no queue."""
        return False

    async def ends_at(self) -> None:
        """Nobody does."""

    async def is_preempted(self) -> bool:
        """Nobody could."""
        return False
