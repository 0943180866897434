"""One host of a job that nobody starts but the user: it leads the job, or follows the host that does.

The first host of the list that is there leads: the supervisor of the job is its process, and holds the run's lock. All hosts,
the leading one too, run an agent for it. A host whose leader is gone looks for another one, and leads itself where no host
before it in the list answers; the job then goes on where its records say that it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Protocol

from launcher.errors import RunError
from launcher.jobs.config import LaunchConfig
from launcher.jobs.job import JobEnd
from launcher.jobs.stop_asked import StopAsked
from launcher.jobs.torchrun.host_agent import HostAgent
from launcher.jobs.torchrun.meeting import Meeting
from launcher.jobs.torchrun.notices import BEAT_S, NodeHello, NoNodeError, Notice, Wire, connect
from launcher.jobs.torchrun.roster import Roster
from launcher.rank_process import EXIT_INTERRUPTED, EXIT_STOPPED
from launcher.run_lock import locked_run

_ASK_S = 2.0
"""For one host to be reached, and to answer."""
_AGAIN_S = 0.3
_ASK_AT_ONCE = 32
_GOODBYE_S = 5.0
"""For hosts to hear that the job is over; and, on a host that was told to stop, for the job to end."""


class Lead(Protocol):
    """Runs the supervisor."""

    async def __call__(self, meeting: Meeting, *, goes_on: bool) -> JobEnd:
        """`goes_on`: whether the job has begun before, under another host or another process of this one."""
        ...


class Node:
    """This host, from the start of `mega launch` to the end of the job. `lead` is called where it leads.

    `run_folder` is locked by the host that leads. How the job has ended it leaves in `end_file` too: the network may be gone.
    """

    def __init__(
        self,
        roster: Roster,
        launch: LaunchConfig,
        *,
        token: str,
        run_folder: Path,
        end_file: Path,
        environ: Mapping[str, str],
        stop: StopAsked,
        lead: Lead,
        say: Callable[[str], None],
    ) -> None:
        self._roster = roster
        self._launch = launch
        self._token = token
        self._run_folder = run_folder
        self._end_file = end_file
        self._stop = stop
        self._lead = lead
        self._say = say
        self._process = uuid.uuid4().hex
        self._meeting = Meeting(token=token, host=roster.name, silence_s=launch.lost_host_seconds, say=say)
        self._agent_changed = asyncio.Event()
        self._agent = HostAgent(roster.name, environ, say=say, on_change=self._agent_changed.set)
        self._goes_on = False
        """Whether the job is under way, as far as this host knows."""
        self._absent_since: dict[str, float] = {}
        """Hosts that do not answer, by the monotonic clock."""

    async def run(self) -> int:
        """The exit code: that of the job; 75 or 130 where this host was told to stop and ran no ranks.

        Raises RunError where no host leads, or this one's port is taken.
        """
        try:
            if self._roster.place is not None:
                await self._meeting.open(self._roster.port)
            while True:
                leader = await self._find_leader()
                if self._stop.signal is not None:
                    return EXIT_STOPPED
                if (code := self._read_end()) is not None:
                    self._say(f"the job has ended, with exit code {code}")
                    return code
                code = await (self._try_to_lead() if leader is None else self._follow(leader))
                if code is not None:
                    return code
                await asyncio.sleep(_AGAIN_S)
        finally:
            await self._agent.end()
            await self._meeting.close()

    async def _find_leader(self) -> str | None:
        """A host that leads; None where this one is to, or the job is over for it. Raises RunError where there is none for
        long."""
        began = time.monotonic()
        while self._stop.signal is None and self._read_end() is None:
            troubles: dict[str, str] = {}
            async for host, answer in self._ask_all():
                if isinstance(answer, str):
                    troubles[host] = answer
                elif answer.leads and (answer.end is None or self._meeting.notice.has_taken_part):
                    return host
                elif answer.end is None:
                    self._goes_on |= answer.has_taken_part
            now = time.monotonic()
            self._absent_since = {host: self._absent_since.get(host, now) for host in troubles}
            # A new job may wait for the host that is to lead it; in one that is under way each second counts.
            grace_s = self._launch.lost_host_seconds if self._goes_on else self._launch.start_timeout_seconds
            if self._roster.place is not None and all(
                host in troubles and now - self._absent_since[host] >= grace_s for host in self._roster.before
            ):
                return None
            if now - began > max(self._launch.wait_for_hosts_seconds, 2 * grace_s):
                said = "; ".join(f"{host}: {trouble}" for host, trouble in troubles.items())
                raise RunError(
                    f"no host has led the job for {now - began:.0f} s ({said or 'those that may are there'})"
                )
            await self._stop.sleep(_AGAIN_S)
        return None

    async def _ask_all(self) -> AsyncIterator[tuple[str, Notice | str]]:
        """The notice of each host that may lead, besides this one; what is wrong where there is none."""
        others = self._roster.others
        for first in range(0, len(others), _ASK_AT_ONCE):
            hosts = others[first : first + _ASK_AT_ONCE]
            for host, answer in zip(hosts, await asyncio.gather(*map(self._ask, hosts))):
                yield host, answer

    async def _ask(self, host: str) -> Notice | str:
        try:
            wire, notice = await self._connect(host, self._roster.port, only_asks=True)
        except NoNodeError as error:
            return str(error)
        wire.close()
        return notice

    async def _connect(self, host: str, port: int, *, only_asks: bool) -> tuple[Wire, Notice]:
        hello = NodeHello(host=self._roster.name, rank=self._roster.rank, process=self._process, only_asks=only_asks)
        return await connect(host, port, hello, token=self._token, timeout_s=_ASK_S)

    async def _try_to_lead(self) -> int | None:
        """The job's exit code; None where another process holds the run."""
        await self._agent.end()  # of the leader before
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked_run(self._run_folder, say=self._say))
            except RunError as error:
                # That of a host that is gone a shared file system may keep for a while.
                self._say(f"waiting: {error}")
                await self._stop.sleep(self._launch.lost_host_seconds)
                return None
            goes_on, self._goes_on = self._goes_on, True
            self._end_file.unlink(missing_ok=True)
            self._meeting.tell(leads=True, has_taken_part=True)
            own_part = asyncio.create_task(self._take_own_part())
            try:
                end = await self._lead(self._meeting, goes_on=goes_on)
                self._tell_end(end.exit_code, end.cause)
                return end.exit_code
            except BaseException:
                self._tell_end(1, f"its supervisor on {self._roster.name} failed")
                raise
            finally:
                await self._meeting.until(lambda: not self._meeting.hosts(), _GOODBYE_S)
                own_part.cancel()

    def _tell_end(self, code: int, cause: str | None) -> None:
        self._meeting.tell(end=code, cause=cause)
        with contextlib.suppress(OSError):
            self._end_file.write_text(f"{code}\n", encoding="utf-8")

    def _read_end(self) -> int | None:
        """The exit code of the job that this host has taken part in, once it has ended; None before."""
        if not self._meeting.notice.has_taken_part:
            return None
        with contextlib.suppress(OSError, ValueError):
            return int(self._end_file.read_text(encoding="utf-8"))
        return None

    async def _take_own_part(self) -> None:
        """The host that leads runs an agent like any other one."""
        while self._meeting.notice.end is None:
            with contextlib.suppress(NoNodeError):
                await self._serve("127.0.0.1", self._meeting.port)
            await asyncio.sleep(_AGAIN_S)

    async def _follow(self, leader: str) -> int | None:
        """Takes part in the job that `leader` leads; its exit code, or None where the leader is lost.

        A stop signal is one to the ranks here, and so to the job: its end tells how that went.
        """
        serving = asyncio.create_task(self._serve(leader, self._roster.port))
        stopping = asyncio.create_task(self._stop_here())
        try:
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            return serving.result() if serving.done() else stopping.result()
        except NoNodeError as error:
            self._say(f"{leader}, which led the job, is gone: {error}")
            self._absent_since = {leader: time.monotonic() - error.silent_s}
            return None
        finally:
            serving.cancel()
            stopping.cancel()

    async def _stop_here(self) -> int:
        """Waits for a stop signal, and does what it asks for; returns the exit code where the job goes on without this host."""
        await self._stop.asked.wait()
        assert self._stop.signal is not None
        if self._agent.is_running:
            self._agent.signal(self._stop.signal)
            at_once = asyncio.create_task(self._stop.at_once.wait())
            while self._agent.is_running and not at_once.done():
                await asyncio.sleep(_AGAIN_S)
            if at_once.done():
                return EXIT_INTERRUPTED
            at_once.cancel()
            await asyncio.sleep(_GOODBYE_S)
        return EXIT_STOPPED

    async def _serve(self, leader: str, port: int) -> int | None:
        """Runs the agents that `leader` asks for; returns the job's exit code at its end, None where it does not lead (any
        more). Raises NoNodeError where it is lost."""
        wire, notice = await self._connect(leader, port, only_asks=False)
        telling = asyncio.create_task(self._tell_status(wire))
        try:
            if notice.leads and notice.host != self._roster.name:
                self._say(f"{notice.host} leads the job")
            while True:
                if notice.end is not None:
                    if notice.cause is not None and notice.host != self._roster.name:
                        self._say(f"the job has ended: {notice.cause}")
                    return notice.end
                if not notice.leads:
                    return None
                self._goes_on = True
                self._meeting.tell(has_taken_part=True)
                if notice.order is None:
                    await self._agent.end()
                elif self._roster.name in notice.order.hosts:
                    await self._agent.run(notice.order, leader=leader)
                notice = await self._next_notice(wire)
        finally:
            telling.cancel()
            wire.close()

    async def _next_notice(self, wire: Wire) -> Notice:
        while True:
            word = await wire.read(silence_s=self._launch.lost_host_seconds)
            if isinstance(word, Notice):
                return word

    async def _tell_status(self, wire: Wire) -> None:
        """The agent's, again and again: it also says that this host is there."""
        while True:
            wire.write(self._agent.status)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._agent_changed.wait(), BEAT_S)
            self._agent_changed.clear()
