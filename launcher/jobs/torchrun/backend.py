"""Hosts that come by themselves, on each of which the user runs `mega launch --on torchrun`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from launcher.jobs.agents.protocol import ATTEMPT, TOKEN
from launcher.jobs.backend import Agents, AgentsStart
from launcher.jobs.stop_asked import StopAsked
from launcher.jobs.supervision.host_lack import not_there
from launcher.jobs.torchrun.meeting import Meeting
from launcher.jobs.torchrun.notices import AgentOrder

_END_SECONDS = 12.0
"""For hosts to end their agents: these ask their ranks first."""
_AT_ONCE_SECONDS = 1.0


class TorchrunBackend:
    """`launcher.jobs.backend.Backend` over the hosts of a meeting, without a queue. torchrun starts the ranks."""

    name = "torchrun"
    task_per_rank = False

    def __init__(
        self,
        meeting: Meeting,
        *,
        listed: Sequence[str],
        nodes: int,
        fewest: int,
        settle_s: float,
        patience_s: float,
        goes_on: bool,
        stop: StopAsked,
        say: Callable[[str], None],
    ) -> None:
        """`nodes` hosts are waited for at first, for `settle_s`; then the `fewest` that will do, up to `patience_s` in all.
        `listed`: of the hostfile; empty where the names of hosts show only when they come. `goes_on`: whether the job was under
        way before.
        """
        self.is_restart = goes_on
        self._meeting = meeting
        self._known = {host: rank for rank, host in enumerate(listed)}
        self._nodes = nodes
        self._fewest = fewest
        self._settle_s = settle_s
        self._patience_s = patience_s
        self._stop = stop
        self._say = say
        self._is_first_look = True

    async def hosts(self) -> Sequence[str]:
        """Those that are there; at the first look only once enough of them are, or their time is over."""
        if self._is_first_look:
            self._is_first_look = False
            await self._wait_for(self._nodes, self._settle_s)
            if len(self._meeting.hosts()) < self._fewest:
                await self._wait_for(self._fewest, self._patience_s - self._settle_s)
        hosts = self._meeting.hosts()
        self._known |= {host: self._meeting.rank(host) for host in hosts}
        return hosts

    async def possible_hosts(self) -> Sequence[str]:
        """Those that are listed, or have been there; and a name for each that is still missing."""
        missing = [rank for rank in range(self._nodes) if rank not in self._known.values()]
        return (*self._known, *(f"the host of --node-rank {rank}" for rank in missing))

    async def start(self, start: AgentsStart) -> Agents:
        """Asks the hosts for an agent each."""
        order = AgentOrder(
            key=f"{start.environ[TOKEN]}/{start.environ[ATTEMPT]}",
            hosts=tuple(start.hosts),
            environ=start.environ,
            output=str(start.output.absolute()),
        )
        self._meeting.tell(order=order)
        return _AgentsOfHosts(self._meeting, order)

    async def requeue(self, *, without: Sequence[str], reason: str) -> bool:
        """There is no queue."""
        return False

    async def ends_at(self) -> None:
        """Nobody does."""

    async def is_preempted(self) -> bool:
        """Nobody could."""
        return False

    async def _wait_for(self, number: int, seconds: float) -> None:
        def are_there() -> bool:
            return len(self._meeting.hosts()) >= number or self._stop.signal is not None

        # Hosts that come at once, this one too, are not missed.
        if seconds <= 0.0 or await self._meeting.until(are_there, min(seconds, _AT_ONCE_SECONDS)):
            return
        hosts = self._meeting.hosts()
        self._known |= {host: self._meeting.rank(host) for host in hosts}
        lack = await not_there(self.name, [host for host in await self.possible_hosts() if host not in hosts])
        self._say(f"waiting up to {seconds:g} s for hosts: {len(hosts)} of {number} are there{lack}")
        stopped = asyncio.create_task(self._poke_at_stop())
        await self._meeting.until(are_there, seconds)
        stopped.cancel()

    async def _poke_at_stop(self) -> None:
        await self._stop.asked.wait()
        self._meeting.poke()


class _AgentsOfHosts:
    """`launcher.jobs.backend.Agents`, as far as their hosts tell."""

    def __init__(self, meeting: Meeting, order: AgentOrder) -> None:
        self._meeting = meeting
        self._order = order

    async def wait(self) -> int:
        """Until no host that is there runs an agent, or is still to start it."""
        await self._meeting.until(lambda: all(self._code(host) is not None for host in self._order.hosts))
        return next((code for host in self._order.hosts if (code := self._code(host))), 0)

    async def end(self) -> None:
        """Has all hosts that are there end theirs."""
        self._meeting.tell(order=None)
        await self._meeting.until(lambda: not any(map(self._runs, self._order.hosts)), _END_SECONDS)

    def _code(self, host: str) -> int | None:
        """Exit code of the agent there; 1 where the host is gone; None while it runs, or has not begun."""
        if host not in self._meeting.hosts():
            return 1
        status = self._meeting.status(host)
        return status.code if status is not None and status.key == self._order.key else None

    def _runs(self, host: str) -> bool:
        status = self._meeting.status(host)
        return status is not None and status.key == self._order.key and status.code is None
