"""The agent that a host runs for the one that leads: one at a time."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from launcher.errors import RunError
from launcher.jobs.agents.host_names import join_head, split_head
from launcher.jobs.agents.protocol import HEAD, HOST_NAME
from launcher.jobs.backends.starter import Starter
from launcher.jobs.torchrun.notices import AgentOrder, AgentStatus
from launcher.rank_process import SUPERVISOR_PID

AGENT_COMMAND = (sys.executable, "-m", "launcher.jobs.torchrun.agent")


class HostAgent:
    """A context without end of its own: `end` before the process ends. `on_change` is called when the status has changed."""

    def __init__(
        self, host: str, environ: Mapping[str, str], *, say: Callable[[str], None], on_change: Callable[[], None]
    ) -> None:
        self.status: AgentStatus | None = None
        self._host = host
        self._environ = environ
        self._say = say
        self._on_change = on_change
        self._starter: Starter | None = None
        self._waiting: asyncio.Task[None] | None = None

    @property
    def is_running(self) -> bool:
        """Whether there is one now."""
        return self.status is not None and self.status.code is None

    async def run(self, order: AgentOrder, *, leader: str) -> None:
        """Starts the agent of `order`, of the host that leads at the address `leader`; the one before it is ended first. The
        same order is obeyed once."""
        if self.status is not None and self.status.key == order.key:
            return
        await self.end()
        addresses, port = split_head(order.environ[HEAD])
        environ = {
            **self._environ,
            **order.environ,
            HEAD: join_head((leader, *addresses), port),
            HOST_NAME: self._host,
            SUPERVISOR_PID: str(os.getpid()),  # it dies with this process
        }
        try:
            self._starter = Starter.start(AGENT_COMMAND, environ=environ, output=Path(order.output))
        except (RunError, OSError) as error:
            self._say(f"no agent could be started: {error}")
            self._set(AgentStatus(key=order.key, code=1))
            return
        self._set(AgentStatus(key=order.key, code=None))
        self._waiting = asyncio.create_task(self._wait(self._starter, order.key))

    def signal(self, number: int) -> None:
        """To the agent, which passes it on to its ranks."""
        if self.is_running and self._starter is not None:
            self._starter.signal(number)

    async def end(self) -> None:
        """Asks it to end, and its ranks to save; then kills it."""
        if self._starter is not None and self._waiting is not None:
            await self._starter.end()
            await self._waiting

    async def _wait(self, starter: Starter, key: str) -> None:
        code = await starter.wait()
        self._set(AgentStatus(key=key, code=code))

    def _set(self, status: AgentStatus) -> None:
        self.status = status
        self._on_change()
