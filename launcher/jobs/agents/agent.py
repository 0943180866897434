"""A host's part of a job: an agent connects to the head, runs the ranks that it is given, and tells what becomes of them.

It never waits for the head while ranks run. Where the head is gone, so are its ranks soon after: another attempt may
already train elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launcher.errors import ConfigError, RunError
from launcher.jobs.agents.agent_ranks import AgentRanks
from launcher.jobs.agents.host_names import addresses_of_head, own_addresses, split_head
from launcher.jobs.agents.ports import hold_port
from launcher.jobs.agents.protocol import (
    ATTEMPT,
    HEAD,
    HOST_NAME,
    TOKEN,
    Beats,
    Connection,
    End,
    Ended,
    Hello,
    Leaving,
    Lines,
    Message,
    ProtocolError,
    Refused,
    Release,
    Signal,
    Start,
    Started,
    Told,
    Welcome,
    beat_interval,
    hang_up_on_the_silent,
)
from launcher.jobs.agents.rank_logs import LineQueue
from launcher.rank_process import EXIT_STOPPED, stop_signals

_CONNECT_S, _WELCOME_S, _AGAIN_S = 3.0, 5.0, 0.3
"""For one address: to be reached, and to answer; then the wait before all are tried again."""
_LINES_S = 0.1
_LINES_AT_ONCE = 500
_MOST_UNSENT_BYTES = 1 << 18
"""Beyond it lines wait here, where they are counted and bounded."""
_LOST_GRACE_S, _KILL_S = 5.0, 10.0
"""Once the head is gone: for ranks to end on SIGTERM, then for killed ones to be gone."""


@dataclass(frozen=True, kw_only=True)
class AgentPlace:
    """What an agent's environment tells: where the head is, and which agent this is."""

    addresses: tuple[str, ...]
    port: int
    token: str
    attempt: int
    host: str
    index: int


def read_place(environ: Mapping[str, str]) -> AgentPlace:
    """The place that the environment gives. Raises ConfigError where no launcher has set it."""
    try:
        addresses, port = split_head(environ[HEAD])
        token, attempt = environ[TOKEN], int(environ[ATTEMPT])
        numbers = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
        index = int(next((environ[name] for name in numbers if environ.get(name)), 0))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{HEAD}, {TOKEN} and {ATTEMPT} must be in the environment of an agent ({error} is wrong): "
            "`mega launch` starts agents itself, nobody else needs to"
        ) from error
    host = environ.get(HOST_NAME) or environ.get("SLURMD_NODENAME") or socket.gethostname()
    return AgentPlace(addresses=tuple(addresses), port=port, token=token, attempt=attempt, host=host, index=index)


class Agent:
    """One agent. `say` gets lines about what goes wrong; `patience_s` is for finding the head; `ranks` starts what it is told."""

    def __init__(
        self,
        place: AgentPlace,
        *,
        environ: Mapping[str, str],
        num_cores: int,
        say: Callable[[str], None],
        patience_s: float = 20.0,
        ranks: type[AgentRanks] = AgentRanks,
    ) -> None:
        self._ranks_class = ranks
        self._place = place
        self._environ = environ
        self._num_cores = num_cores
        self._say_line = say
        self._patience_s = patience_s
        self._name = uuid.uuid4().hex
        self._host = place.host
        self._lines = LineQueue()
        self._beats = Beats()
        self._has_started = False
        self._is_ending = False

    async def run(self) -> int:
        """From the search for the head to the end; returns the exit code: 0 when sent home, 1 when the head was lost, 75 when
        told to end before there were ranks. Must be called in the main thread.

        Raises RunError where there is no head, or it refuses this agent.
        """
        loop = asyncio.get_running_loop()
        self._code: asyncio.Future[int] = loop.create_future()
        self._connection: Connection | None = None
        self._port_holder = hold_port()  # until ranks need it: between the two, no kernel gives it to anybody
        self._tasks: list[asyncio.Task[None]] = []
        self._ranks = self._ranks_class(
            environ=self._environ,
            num_cores=self._num_cores,
            lines=self._lines,
            on_end=self._on_rank_end,
            say=self._say,
        )
        for number in stop_signals():
            loop.add_signal_handler(number, self._on_stop_signal, number)
        loop.add_signal_handler(signal.SIGCHLD, self._ranks.look)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())
        connecting = loop.create_task(self._connect())
        try:
            await asyncio.wait((connecting, self._code), return_when=asyncio.FIRST_COMPLETED)
            if connecting.done():
                connecting.result()
            return await self._code
        finally:
            for task in (connecting, *self._tasks):
                task.cancel()
            self._port_holder.close()
            self._beats.stop()
            if self._connection is not None:
                self._connection.on_end = _ignore_end
                self._connection.say_goodbye(Leaving(why="its agent has ended"))
            self._ranks.close()

    async def _connect(self) -> None:
        """Finds the head. Raises RunError where that cannot be."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience_s
        addresses = addresses_of_head(self._place.addresses)
        while True:
            troubles = []
            for address in addresses:
                trouble = await self._try(address)
                if trouble is None:
                    return
                troubles.append(f"{address}: {trouble}")
            if loop.time() > deadline:
                raise RunError(
                    f"the agent on {self._host} cannot reach the supervisor of its job at port {self._place.port} "
                    f"({'; '.join(troubles)}): does the supervisor run, and does a firewall keep the hosts apart?"
                )
            await asyncio.sleep(_AGAIN_S)

    async def _try(self, address: str) -> str | None:
        """Says hello to whoever is at `address`; returns what stands against it, None where it is the head."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str | None] = loop.create_future()

        def take(connection: Connection, message: Message) -> None:
            self._take_answer(connection, message, answer)

        def end(connection: Connection, why: str) -> None:
            if not answer.done():
                answer.set_result(why)

        connection = Connection(on_message=take, on_end=end, token=self._place.token, comes=True)
        try:
            async with asyncio.timeout(_CONNECT_S):
                await loop.create_connection(lambda: connection, address, self._place.port)
            connection.send(self._hello(connection.own_address))
            async with asyncio.timeout(_WELCOME_S):
                return await answer
        except TimeoutError:
            connection.hang_up("no answer")
            return "no answer"
        except OSError as error:
            return error.strerror or str(error)

    def _hello(self, own_address: str) -> Hello:
        return Hello(
            attempt=self._place.attempt,
            host=self._place.host,
            index=self._place.index,
            agent=self._name,
            addresses=(own_address, *own_addresses()),
            port=int(self._port_holder.getsockname()[1]),
            sent=time.time(),
        )

    def _take_answer(self, connection: Connection, message: Message, answer: asyncio.Future[str | None]) -> None:
        if answer.done():
            return
        if isinstance(message, Refused):
            answer.set_exception(RunError(f"the agent on {self._host} is refused by its job: {message.why}"))
        elif isinstance(message, Welcome):
            self._host = message.host
            self._connection = connection
            connection.on_message = lambda _, message: self._hear(message)
            connection.on_end = lambda _, why: self._lose_head(why)
            self._beats.add(connection)
            self._beats.start(beat_interval(message.silence_s))
            watch = hang_up_on_the_silent(lambda: [connection], message.silence_s)
            self._tasks += [asyncio.create_task(watch), asyncio.create_task(self._send_lines())]
            answer.set_result(None)
        else:
            raise ProtocolError(f"a head does not begin with {type(message).__name__}")

    def _hear(self, message: Message) -> None:
        match message:
            case Start() if not self._has_started:
                self._has_started = True
                self._port_holder.close()
                failed = self._ranks.start(message, host=self._host)
                self._send(Started())
                for end in failed:
                    self._send(end)
            case Signal():
                self._ranks.signal(message.number)
            case End():
                self._ranks.end(at_once=message.at_once)
            case Release():
                self._finish(0, grace_s=0.0)
            case _:
                raise ProtocolError(f"a head does not say {type(message).__name__} now")

    def _on_rank_end(self, end: Ended) -> None:
        self._pump(all_of_them=True)
        self._send(end)

    async def _send_lines(self) -> None:
        while True:
            await asyncio.sleep(_LINES_S)
            self._pump()

    def _pump(self, *, all_of_them: bool = False) -> None:
        """Sends lines, as far as the head takes them. Before the end of a rank is told, all of them: these are bounded."""
        assert self._connection is not None
        while self._lines and (all_of_them or self._connection.unsent_bytes < _MOST_UNSENT_BYTES):
            self._send(Lines(lines=tuple(self._lines.take(_LINES_AT_ONCE))))

    def _send(self, message: Message) -> None:
        if self._connection is not None:
            self._connection.send(message)

    def _on_stop_signal(self, number: int) -> None:
        """Ranks save and end. Without any there is nothing to wait for."""
        if self._ranks.are_running:
            self._ranks.signal(number)
            self._send(Told())
            return
        self._send(Leaving(why=f"its agent was told to end ({signal.Signals(number).name})"))
        self._finish(EXIT_STOPPED, grace_s=0.0)

    def _lose_head(self, why: str) -> None:
        self._say(f"the supervisor of the job is gone ({why}): the ranks here end")
        self._finish(1, grace_s=_LOST_GRACE_S)

    def _finish(self, code: int, *, grace_s: float) -> None:
        if self._is_ending:
            return
        self._is_ending = True
        self._tasks.append(asyncio.create_task(self._end_ranks(code, grace_s)))

    async def _end_ranks(self, code: int, grace_s: float) -> None:
        """Ends the ranks, and then the agent."""
        if self._ranks.are_running and grace_s:
            self._ranks.end(at_once=False)
            await self._ranks.until_ended(grace_s)
        self._ranks.end(at_once=True)
        await self._ranks.until_ended(_KILL_S)
        if not self._code.done():
            self._code.set_result(code)

    def _say(self, text: str) -> None:
        """From any thread."""
        with contextlib.suppress(OSError):  # whoever started this agent may be gone
            self._say_line(f"agent on {self._host}: {text}")


def _ignore_end(connection: Connection, why: str) -> None:
    """The agent is at its end itself."""
