"""One attempt as the head sees it: which agents have come, the ranks that they run, and what becomes of these."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.failure_record import FailureRecord
from launcher.jobs.agents.host_names import find_host, is_loopback
from launcher.jobs.agents.log_folding import Folder
from launcher.jobs.agents.protocol import (
    Connection,
    End,
    Ended,
    Hello,
    Leaving,
    Lines,
    Message,
    ProtocolError,
    Release,
    Signal,
    Start,
    Started,
    Told,
    Welcome,
)
from launcher.jobs.agents.rank_logs import CappedLog, LogWriter
from launcher.jobs.agents.ranks import HostLost, RankEnded, RanksPlan, StopHeard

_START_S = 60.0
"""How long an agent may take to start its ranks: what they are executed from may be slow."""
_KILL_S = 15.0
"""How long a killed rank may take to be gone. One that hangs in the kernel, as behind a dead file server, never is."""
_COME_BACK_S = 2.0
"""An agent that was answered late tries again: so long after it hung up it may be there again."""
_RELEASE_S = 5.0
"""How long agents that are sent home may take."""


@dataclass(eq=False, kw_only=True)
class Agent:
    """An agent that has been welcomed."""

    host: str
    expected: bool
    """Whether it may get ranks: its host is one of the attempt's, and not all of that host's agents were there."""
    hello: Hello
    connection: Connection
    clock_ahead_s: float
    """By how much this host's clock is ahead of its host's, at most."""
    ranks: tuple[int, ...] = ()
    is_here: bool = True
    has_started: bool = False
    leaves: str = ""
    """Why it ends, as it says itself."""


class Attempt:
    """The agents of one attempt, and their ranks. Made by `Head.attempt`."""

    def __init__(
        self,
        number: int,
        *,
        expected: Mapping[str, int],
        silence_s: float,
        say: Callable[[str], None],
        log: LogWriter,
        job_log: CappedLog,
        echo: Callable[[str], None] | None,
    ) -> None:
        self.number = number
        self._expected = dict(expected)
        self._silence_s = silence_s
        self._say = say
        self._log = log
        self._job_log = job_log
        self._echo = echo
        self._agents: dict[tuple[str, int], Agent] = {}
        """By host and index."""
        self._for_ranks: dict[str, list[Agent]] = {}
        """Of each host: those of its agents that are expected."""
        self._gone: dict[str, float] = {}
        """Hosts an agent of which has come, and gone again: when, by the event loop's clock."""
        self._running: dict[int, Agent] = {}
        self._host_of: dict[int, str] = {}
        self._folder: Folder | None = None
        self._events: asyncio.Queue[RankEnded | HostLost | StopHeard] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._is_over = False

    @property
    def hosts_present(self) -> tuple[str, ...]:
        """Expected hosts all of whose agents are there."""
        return tuple(host for host, number in self._expected.items() if len(self._for_ranks.get(host, ())) >= number)

    def host_of(self, rank: int) -> str:
        """The host on which the rank was started."""
        return self._host_of[rank]

    def running(self) -> frozenset[int]:
        """Ranks that have been started and have not ended, on hosts that are not lost."""
        return frozenset(self._running)

    async def gather(self, timeout_s: float) -> tuple[str, ...]:
        """Waits until all agents are there, or it is clear that no more of them will come; returns the hosts that lack one."""

        def are_there() -> bool:
            gone = (host for host, since in self._gone.items() if _now() >= since + _COME_BACK_S)
            return {*self.hosts_present, *gone} >= self._expected.keys()

        await self._until(are_there, timeout_s)
        present = self.hosts_present
        return tuple(host for host in self._expected if host not in present)

    async def start_ranks(self, plan: RanksPlan) -> None:
        """Starts ranks, once an attempt; returns when all agents concerned have done so or are lost. Other agents idle.

        A host of the plan that is gone by now is told by `next_event`, with the ranks that it should have run.
        """
        self._folder = Folder(self._write_line, num_ranks=plan.num_ranks)
        self._log.write(self._job_log, b"")  # so that who follows it finds it
        agents, lost = self._place(plan)
        address, port = _meeting_point(agents)
        for agent in agents:
            local_rank = agent.ranks[0] % plan.ranks_per_host
            agent.connection.send(
                Start(
                    ranks=agent.ranks,
                    first_local_rank=local_rank,
                    ranks_on_host=plan.ranks_per_host,
                    num_ranks=plan.num_ranks,
                    command=tuple(plan.command),
                    environ=dict(plan.environ),
                    directory=str(plan.directory.absolute()),
                    working_directory=str(plan.working_directory.absolute()),
                    master_address=address,
                    master_port=port,
                    max_log_bytes=plan.max_log_bytes,
                )
            )
        for host, ranks in lost.items():
            self._events.put_nowait(
                HostLost(
                    host=host, why="its agent was gone before the start", silent=False, at=time.time(), ranks=ranks
                )
            )
        if not await self._until(lambda: all(agent.has_started or not agent.is_here for agent in agents), _START_S):
            for agent in agents:
                if not agent.has_started:
                    agent.connection.hang_up(f"its agent could not start ranks within {_START_S:g} s")

    async def next_event(self) -> RankEnded | HostLost | StopHeard:
        """The next end of a rank, loss of a host, or stop that came to a host itself; waits for it."""
        return await self._events.get()

    def signal(self, number: int) -> None:
        """Sends a signal to every running rank. Of those that ask to stop (SIGINT, SIGTERM, SIGUSR1) each kind arrives once."""
        for agent in set(self._running.values()):
            agent.connection.send(Signal(number=number))

    async def end_ranks(self, grace_s: float) -> None:
        """Ends all ranks: SIGTERM, and SIGKILL after `grace_s`. Returns when each has ended or its host is lost."""
        for at_once, wait_s in ((False, grace_s), (True, _KILL_S)):
            for agent in set(self._running.values()):
                agent.connection.send(End(at_once=at_once))
            if await self._until(lambda: not self._running, wait_s):
                return
        for rank, agent in self._running.items():
            agent.connection.hang_up(f"rank {rank} there could not be killed: it hangs in its host's kernel")
        await self._until(lambda: not self._running)

    async def release(self) -> None:
        """Sends all agents home, and closes the attempt's log. Ranks that still run are killed."""
        self._is_over = True
        for agent in self._agents.values():
            agent.connection.send(Release())
        await self._until(lambda: not self._agents, _RELEASE_S)
        self.abandon()

    def abandon(self) -> None:
        """Hangs up on all agents, which end their ranks then, and closes the attempt's log."""
        self._is_over = True
        for connection in self.connections():
            connection.hang_up("the attempt is over")
        if self._folder is not None:
            self._folder.close()
            self._folder = None
            self._log.close(self._job_log)

    def welcome(self, hello: Hello, connection: Connection) -> str | None:
        """Takes an agent in; returns a reason where that cannot be. For `Head`."""
        if hello.attempt != self.number:
            return f"it is of attempt {hello.attempt}, and now is attempt {self.number}"
        if self._is_over:
            return f"attempt {self.number} is over"
        host = find_host(hello.host, hello.addresses, self._expected) or hello.host
        same = self._agents.get((host, hello.index))
        if same is not None and (same.hello.agent != hello.agent or same.ranks):
            return f"agent {hello.index} of {host} is there already: two processes claim the same place"
        if same is not None:
            self._forget(same)
            same.connection.hang_up("it has come over another connection")
        expected = len(self._for_ranks.get(host, ())) < self._expected.get(host, 0)
        if not expected:
            what = "more agents than asked for" if host in self._expected else "which is not one of the attempt's hosts"
            self._say(f"an agent has come from {host}, {what}: it gets nothing to do")
        agent = Agent(
            host=host,
            expected=expected,
            hello=hello,
            connection=connection,
            clock_ahead_s=time.time() - hello.sent,
        )
        self._agents[host, hello.index] = agent
        if expected:
            self._for_ranks.setdefault(host, []).append(agent)
        self._gone.pop(host, None)
        connection.on_message = lambda _, message: self._hear(agent, message)
        connection.on_end = lambda _, why: self._lose(agent, why)
        connection.send(Welcome(host=host, silence_s=self._silence_s))
        self._poke()
        return None

    def flush_lines(self, now: float) -> None:
        """Writes lines that have waited long enough to be folded. For `Head`, which calls it again and again."""
        if self._folder is not None:
            self._folder.flush(now)

    def connections(self) -> list[Connection]:
        """Those of all agents. For `Head`."""
        return [agent.connection for agent in self._agents.values()]

    def _place(self, plan: RanksPlan) -> tuple[list[Agent], dict[str, tuple[int, ...]]]:
        """Deals ranks out to agents; returns these in the order of their ranks, and what should have been on lost hosts."""
        placed: list[Agent] = []
        lost: dict[str, tuple[int, ...]] = {}
        for place, host in enumerate(plan.hosts):
            ranks = range(place * plan.ranks_per_host, (place + 1) * plan.ranks_per_host)
            self._host_of.update(dict.fromkeys(ranks, host))
            agents = sorted(self._for_ranks.get(host, ()), key=lambda agent: agent.hello.index)
            if not agents or len(agents) < self._expected.get(host, 0):
                lost[host] = tuple(ranks)
                continue
            share, more = divmod(len(ranks), len(agents))
            for index, agent in enumerate(agents):
                first = index * share + min(index, more)
                agent.ranks = tuple(ranks[first : first + share + (index < more)])
                if agent.ranks:
                    self._running.update(dict.fromkeys(agent.ranks, agent))
                    placed.append(agent)
        return placed, lost

    def _forget(self, agent: Agent) -> None:
        agent.is_here = False
        del self._agents[agent.host, agent.hello.index]
        if agent.expected:
            self._for_ranks[agent.host].remove(agent)

    def _hear(self, agent: Agent, message: Message) -> None:
        match message:
            case Lines():
                self._take_lines(agent, message.lines)
            case Ended():
                self._take_end(agent, message)
            case Started():
                agent.has_started = True
                self._poke()
            case Told():
                self._events.put_nowait(StopHeard(host=agent.host))
            case Leaving():
                agent.leaves = agent.leaves or message.why
            case _:
                raise ProtocolError(f"an agent says {type(message).__name__}")

    def _take_lines(self, agent: Agent, lines: tuple[Any, ...]) -> None:
        now = time.monotonic()
        for each in lines:
            match each:
                case [int(rank), str(text)] if rank in agent.ranks:
                    if self._folder is not None:
                        self._folder.add(rank, text, now)
                case _:
                    raise ProtocolError(f"{each!r:.100} is no line of its ranks")

    def _take_end(self, agent: Agent, message: Ended) -> None:
        if self._running.pop(message.rank, None) is not agent:
            raise ProtocolError(f"rank {message.rank} is none of its running ranks")
        # The message that took the least time tells best how the clocks differ.
        agent.clock_ahead_s = min(agent.clock_ahead_s, time.time() - message.sent)
        try:
            record = FailureRecord(**message.record) if message.record is not None else None
            record = record and replace(record, at=record.at + agent.clock_ahead_s)
        except TypeError as error:
            raise ProtocolError("this is no failure record") from error
        self._events.put_nowait(
            RankEnded(
                rank=message.rank,
                host=agent.host,
                code=message.code,
                at=message.at + agent.clock_ahead_s,
                record=record,
                last_line=message.last_line,
                ended_by_us=message.ended_by_us,
            )
        )
        self._poke()

    def _lose(self, agent: Agent, why: str) -> None:
        if not agent.is_here:
            return
        self._forget(agent)
        ranks = tuple(rank for rank in agent.ranks if self._running.pop(rank, None) is not None)
        if agent.expected:
            self._gone[agent.host] = _now()
            asyncio.get_running_loop().call_later(_COME_BACK_S, self._poke)
        if agent.expected and not self._is_over:
            why = agent.leaves or ("its agent's connection ended" if why == "its connection ended" else why)
            silent = agent.connection.silent and not agent.leaves
            self._events.put_nowait(HostLost(host=agent.host, why=why, silent=silent, at=time.time(), ranks=ranks))
        self._poke()

    def _write_line(self, line: str) -> None:
        self._log.write(self._job_log, line.encode(errors="replace") + b"\n")
        if self._echo is not None:
            try:
                self._echo(line)
            except OSError:  # nobody reads any more
                self._echo = None

    def _poke(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Waits for something that a change of agents or ranks brings about; returns whether it did."""
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await self._changed.wait()
        except TimeoutError:
            return condition()
        return True


def _now() -> float:
    return asyncio.get_running_loop().time()


def _meeting_point(agents: Sequence[Agent]) -> tuple[str, int]:
    """Address and port of rank 0's host at which the ranks of these agents can meet."""
    if not agents:
        return "127.0.0.1", 0
    first = agents[0]
    address = next(iter(first.hello.addresses), "")
    if len({agent.host for agent in agents}) == 1:
        address = "127.0.0.1"
    elif is_loopback(address):
        # It is beside the head. So are the others, or they know it by its name.
        beside = all(is_loopback(agent.connection.peer_address) for agent in agents)
        address = "127.0.0.1" if beside else first.host
    return address, first.hello.port
