"""The head of a job: where the agents of all hosts come together. One a supervisor, over all its attempts.

It listens on all addresses of its host. Anybody in the network may come: who does not prove within a few seconds to know the
job's token, or says anything else, is hung up on.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from launcher.errors import RunError
from launcher.jobs.agents.attempt import Attempt
from launcher.jobs.agents.host_names import head_addresses, join_head
from launcher.jobs.agents.protocol import (
    HEAD,
    LONGEST_HELLO,
    LONGEST_LINE,
    TOKEN,
    Beats,
    Connection,
    Hello,
    Message,
    ProtocolError,
    Refused,
    beat_interval,
    hang_up_on_the_silent,
)
from launcher.jobs.agents.rank_logs import CappedLog, LogWriter
from launcher.jobs.agents.ranks import HostLost, RankEnded, RanksPlan, StopHeard

__all__ = ["Attempt", "Head", "HostLost", "RankEnded", "RanksPlan", "StopHeard"]

_NAMELESS_S = 10.0
"""So long somebody may be connected without a hello."""
_FOLD_S = 0.1
_BACKLOG = 4096
_FILES_BESIDE_AGENTS = 256
_FEWEST_NAMELESS = 64
_LOG_END_S = 10.0


class Head:
    """Listens while it is entered (`async with`).

    `silence_s`: after so long without a sign of life an agent's host counts as lost, and an agent gives up its ranks.
    `say` gets lines for the user. `addresses` of this host that agents are to try before those that are found.
    """

    def __init__(
        self, *, token: str, silence_s: float, say: Callable[[str], None], addresses: Sequence[str] = ()
    ) -> None:
        self._token = token
        self._silence_s = silence_s
        self._say = say
        self._addresses = addresses
        self._attempt: Attempt | None = None
        self._nameless: dict[Connection, asyncio.TimerHandle] = {}
        self._most_nameless = _FEWEST_NAMELESS
        self._refused: set[str] = set()
        self._beats = Beats()
        self._exits = contextlib.AsyncExitStack()
        self._listener: socket.socket | None = None
        self._logs: LogWriter | None = None

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._listener = _listen()
        server = await loop.create_server(self._accept, sock=self._listener, backlog=_BACKLOG)
        self._exits.callback(server.close)
        self._logs = LogWriter(lambda text: _say_in(loop, self._say, text))
        self._exits.push_async_callback(asyncio.to_thread, self._logs.end, _LOG_END_S)
        self._beats.start(beat_interval(self._silence_s))
        self._exits.callback(self._beats.stop)
        for task in (hang_up_on_the_silent(self._connections, self._silence_s), self._flush_lines()):
            self._exits.push_async_callback(_cancel, asyncio.create_task(task))
        self._exits.callback(self._hang_up_on_all)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exits.aclose()

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._listener is not None
        return int(self._listener.getsockname()[1])

    @property
    def environ(self) -> dict[str, str]:
        """What an agent needs in its environment to find this head, and to be let in."""
        return {HEAD: join_head(head_addresses(self._addresses), self.port), TOKEN: self._token}

    def attempt(
        self,
        number: int,
        *,
        expected: Mapping[str, int],
        log: Path,
        echo: Callable[[str], None] | None = None,
        max_log_bytes: int = 100_000_000,
    ) -> Attempt:
        """A new attempt, for which agents may come from now on; those of earlier ones are hung up on, or refused.

        `expected`: how many agents will come from each host. `log` gets the ranks' lines, folded, up to `max_log_bytes`,
        and so does `echo`. Raises RunError where this process may not open a connection for each agent.
        """
        assert self._logs is not None
        agents = sum(expected.values())
        needed = agents + _FILES_BESIDE_AGENTS
        allowed = _allow_open_files(needed + _FEWEST_NAMELESS, wanted=needed + _FEWEST_NAMELESS + 2 * agents)
        self._most_nameless = allowed - needed
        if self._attempt is not None:
            self._attempt.abandon()
        self._attempt = Attempt(
            number,
            expected=expected,
            silence_s=self._silence_s,
            say=self._say,
            log=self._logs,
            job_log=CappedLog(log, max_bytes=max_log_bytes),
            echo=echo,
        )
        return self._attempt

    def _accept(self) -> Connection:
        connection = Connection(
            on_message=self._greet, on_end=self._forget, token=self._token, comes=False, longest=LONGEST_HELLO
        )
        if len(self._nameless) >= self._most_nameless:
            # An agent says who it is at once. So those who wait are strangers, and must not keep agents out.
            oldest = next(iter(self._nameless))
            self._forget(oldest, "")
            oldest.hang_up("others want to say who they are")
        timer = asyncio.get_running_loop().call_later(_NAMELESS_S, connection.hang_up, "it has not said who it is")
        self._nameless[connection] = timer
        return connection

    def _forget(self, connection: Connection, why: str) -> None:
        if (timer := self._nameless.pop(connection, None)) is not None:
            timer.cancel()

    def _greet(self, connection: Connection, message: Message) -> None:
        """Takes the first message of somebody new."""
        if not isinstance(message, Hello):
            raise ProtocolError("no hello")
        self._forget(connection, "")
        connection.longest = LONGEST_LINE
        refusal = "no attempt has begun" if self._attempt is None else self._attempt.welcome(message, connection)
        if refusal is None:
            self._beats.add(connection)
            return
        connection.say_goodbye(Refused(why=refusal))
        if refusal not in self._refused:  # once, however many agents of an old attempt come
            self._refused.add(refusal)
            self._say(f"an agent on {message.host} was refused: {refusal}")

    def _connections(self) -> list[Connection]:
        return [] if self._attempt is None else self._attempt.connections()

    async def _flush_lines(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_FOLD_S)
            if self._attempt is not None:
                self._attempt.flush_lines(loop.time())

    def _hang_up_on_all(self) -> None:
        for connection in self._nameless:
            connection.hang_up("the job is over")
        if self._attempt is not None:
            self._attempt.abandon()


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 may be compiled in and switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
    return socket.create_server(("", 0), backlog=_BACKLOG)


def _allow_open_files(needed: int, *, wanted: int) -> int:
    """Lets this process open `wanted` files, or as many as it may; returns how many of these it may open now. Raises RunError
    where these are fewer than `needed`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if allowed < needed:
        raise RunError(
            f"this process may open {hard} files, and a job of this size needs {needed}: raise its limit (ulimit -Hn)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed


def _say_in(loop: asyncio.AbstractEventLoop, say: Callable[[str], None], text: str) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(say, text)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
