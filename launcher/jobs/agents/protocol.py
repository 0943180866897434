"""What the head of a job and its agents say to one another, and how: a JSON object a line, over TCP.

Both prove first that they know the job's token: see `handshake`. Then the agent says `Hello`; the head answers `Welcome` or
`Refused`. An empty object is a beat: each end sends one every second or two from a thread of its own, so that the other one
can tell a host that is gone from one whose file system takes its time. It alone stands without a proof.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

from launcher.jobs.agents.handshake import Seal, StrangerError, answer, new_nonce, take_answer

HEAD = "MEGA_HEAD"
"""Where the head listens, for agents: addresses to try in turn, and its port, as "10.0.0.1,node1:40123"."""
TOKEN = "MEGA_JOB_TOKEN"
"""What tells an agent of this job from anybody else in the network."""
ATTEMPT = "MEGA_ATTEMPT"
"""Number of the attempt that an agent, or a rank, belongs to."""
HOST_NAME = "MEGA_HOST_NAME"
"""Name of the host as the job knows it. For an agent: where set, it counts instead of the host's own name."""
PREFLIGHT = "MEGA_PREFLIGHT"
"""For a rank: file into which the outcome of preflight is written; where set, there is one."""
CHOSEN = "MEGA_CHOSEN"
"""For a rank: names of the variables that its agent has set by what its host has, separated by commas. Hosts may differ."""

LONGEST_HELLO, LONGEST_LINE = 1 << 16, 1 << 26
"""Bytes of a line: of one who has not said yet who it is, and of one who has."""


class ProtocolError(Exception):
    """The other end says what none of ours would say."""


class _Message:
    """Checks what has come over the wire: each field is there, and is of its type as far as JSON tells types."""

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, each.name, value)
            if not any(_fits(value, text) for text in str(each.type).split(" | ")):
                raise ProtocolError(f"{type(self).__name__}.{each.name} is {value!r:.100}")


def _fits(value: Any, type_text: str) -> bool:
    name = type_text.partition("[")[0]
    if name == "None":
        return value is None
    types: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool, "tuple": tuple, "dict": dict}
    return isinstance(value, types[name]) and (name == "bool" or not isinstance(value, bool))


@dataclass(frozen=True, kw_only=True)
class Hello(_Message):
    """An agent's first word."""

    attempt: int
    host: str
    """As `MEGA_HOST_NAME`, SLURM or the host itself says."""
    index: int
    """Orders the agents of one host; the starter's number of the process."""
    agent: str
    """Made up by the process, so that one who comes over a second connection is not taken for two."""
    addresses: tuple[str, ...]
    """Of the host; the first is the one from which it has reached the head."""
    port: int
    """Free on that host: for the ranks' meeting, should rank 0 be there."""
    sent: float
    """Seconds since 1970, by the host's clock."""


@dataclass(frozen=True, kw_only=True)
class Welcome(_Message):
    """The head's answer to an agent of its own."""

    host: str
    """The host's name as the job knows it."""
    silence_s: float
    """Silence of either end after which it counts as gone."""


@dataclass(frozen=True, kw_only=True)
class Refused(_Message):
    """The head's answer to an agent that it has no use for; it hangs up."""

    why: str


@dataclass(frozen=True, kw_only=True)
class Start(_Message):
    """Asks an agent to start ranks."""

    ranks: tuple[int, ...]
    first_local_rank: int
    """Place on its host of the first of them; the others follow."""
    ranks_on_host: int
    num_ranks: int
    command: tuple[str, ...]
    environ: dict[str, str]
    directory: str
    """Takes logs and failure records."""
    working_directory: str
    master_address: str
    master_port: int
    max_log_bytes: int
    """Of each rank."""


@dataclass(frozen=True, kw_only=True)
class Signal(_Message):
    """Asks an agent to pass a signal on to its ranks."""

    number: int


@dataclass(frozen=True, kw_only=True)
class End(_Message):
    """Asks an agent to end its ranks: with SIGTERM, or at once."""

    at_once: bool


@dataclass(frozen=True, kw_only=True)
class Release(_Message):
    """Sends an agent home."""


@dataclass(frozen=True, kw_only=True)
class Started(_Message):
    """An agent has done what `Start` asks; ranks that could not be started are told by `Ended`."""


@dataclass(frozen=True, kw_only=True)
class Lines(_Message):
    """What ranks have printed: pairs of rank and line, in the order of each rank."""

    lines: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Ended(_Message):
    """A rank has ended; all that it printed has been told before."""

    rank: int
    code: int
    """Exit code; negative: the signal."""
    at: float
    """Seconds since 1970 by the host's clock, as `sent`, when this was written."""
    sent: float
    record: dict[str, Any] | None
    """Of its failure, where it has left one."""
    last_line: str
    ended_by_us: bool
    """Whether it ended only after the head, or its agent, had made it end."""


@dataclass(frozen=True, kw_only=True)
class Told(_Message):
    """An agent was told to stop by somebody else than the head, and has told its ranks."""


@dataclass(frozen=True, kw_only=True)
class Leaving(_Message):
    """An agent that is about to end says why."""

    why: str


Message: TypeAlias = (
    Hello | Welcome | Refused | Start | Signal | End | Release | Started | Lines | Ended | Told | Leaving
)
_KINDS = {
    kind.__name__: kind
    for kind in (Hello, Welcome, Refused, Start, Signal, End, Release, Started, Lines, Ended, Told, Leaving)
}
_BEAT = b"{}\n"


def encode(message: Message) -> bytes:
    """The message as one line, without its end."""
    return json.dumps({type(message).__name__: vars(message)}).encode()


def decode(line: bytes) -> Message:
    """The message of one line. Raises ProtocolError where it is none."""
    try:
        ((name, values),) = json.loads(line).items()
        message: Message = _KINDS[name](**values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ProtocolError(f"{line[:100]!r} is no message") from error
    return message


@dataclass(eq=False, kw_only=True)
class Connection(asyncio.Protocol):
    """One end of a connection between head and agent. All but `beat` is for the event loop's thread.

    `token` is the job's; who `comes` begins. What is sent before both ends know each other waits until then. `on_message` gets
    each message, and may be changed; ProtocolError from it hangs up. `on_end` is called once, with the reason, when nothing
    more will come.
    """

    on_message: Callable[[Connection, Message], None]
    on_end: Callable[[Connection, str], None]
    token: str
    comes: bool
    longest: int = LONGEST_LINE
    quiet_s: float = 0.0
    """How long nothing has come, in time in which this process itself ran."""
    why: str = ""
    """Why it was hung up, where this end did it."""
    silent: bool = False
    """Whether it was hung up because nothing came any more."""
    _transport: asyncio.Transport | None = None
    _rest: bytes = b""
    _nonce: bytes = field(default_factory=new_nonce)
    _seal: Seal | None = None
    """None until the other end has proved that it knows the token, or, to who listens, has said who it is to."""
    _waiting: list[bytes] = field(default_factory=list)
    _sending: threading.Lock = field(default_factory=threading.Lock)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio calls it."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self.why:  # it was hung up on before it was made
            transport.abort()
        elif self.comes:
            transport.write(self._nonce + b"\n")

    def data_received(self, data: bytes) -> None:
        """asyncio calls it."""
        self.quiet_s = 0.0
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            longest = LONGEST_HELLO if self._seal is None else self.longest
            if max(map(len, (*lines, self._rest))) > longest:
                raise ProtocolError("a line is too long")
            for line in lines:
                if self.why:
                    break
                self._take(line)
        except StrangerError as error:
            self.hang_up(str(error))
        except ProtocolError as error:
            self.hang_up(f"it does not speak as it should: {error}")

    def _take(self, line: bytes) -> None:
        assert self._transport is not None
        if line == _BEAT[:-1]:
            return
        if self._seal is not None:
            self.on_message(self, decode(self._seal.open(line)))
        elif self.comes:
            self._seal = take_answer(self.token, self._nonce, line)
            for waiting in self._waiting:
                self._transport.write(self._seal.seal(waiting) + b"\n")
            self._waiting.clear()
        else:
            words, self._seal = answer(self.token, line)
            self._transport.write(words + b"\n")

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio calls it, and closes the socket then."""
        with self._sending:
            self._transport = None
        self.on_end(self, self.why or "its connection ended")

    @property
    def is_open(self) -> bool:
        """Whether something can still be sent. From any thread."""
        transport = self._transport  # another thread may set it to None meanwhile
        return transport is not None and not transport.is_closing()

    @property
    def unsent_bytes(self) -> int:
        """What waits here because the other end, or the network, does not take it."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    @property
    def own_address(self) -> str:
        """Of this end; empty where nobody knows."""
        return self._address("sockname")

    @property
    def peer_address(self) -> str:
        """Of the other end; empty where nobody knows."""
        return self._address("peername")

    def send(self, message: Message) -> None:
        """Sends, now or as soon as the other end takes it. To one that is gone nothing is sent."""
        line = encode(message)
        with self._sending:
            if self._seal is None:
                self._waiting.append(line)
            elif self._transport is not None and not self._transport.is_closing():
                self._transport.write(self._seal.seal(line) + b"\n")

    def beat(self) -> None:
        """Says that this process lives, from any thread. While other words wait to be sent there is no need."""
        with self._sending, contextlib.suppress(OSError, RuntimeError):  # asyncio sees what is wrong by itself
            transport = self._transport
            if transport is None or transport.is_closing() or transport.get_write_buffer_size():
                return
            # So nothing is half sent, and as long as the lock is held nothing will be: this stands on a line of its own.
            end = transport.get_extra_info("socket")
            if os.write(end.fileno(), _BEAT) < len(
                _BEAT
            ):  # hardly ever for so few bytes; what follows would be garbled
                end.shutdown(socket.SHUT_RDWR)

    def hang_up(self, why: str, *, silent: bool = False) -> None:
        """Ends the connection at once. Where that is done twice, the first reason stands."""
        if not self.why:
            self.why, self.silent = why, silent
        if self._transport is not None:
            self._transport.abort()

    def say_goodbye(self, last: Message) -> None:
        """Sends a last message, then ends the connection."""
        self.send(last)
        self.why = self.why or "this end closed it"
        if self._transport is not None:
            self._transport.close()

    def _address(self, which: str) -> str:
        found = None if self._transport is None else self._transport.get_extra_info(which)
        return str(found[0]).removeprefix("::ffff:") if isinstance(found, tuple) else ""


class Beats:
    """Beats on connections from a thread of its own: whatever holds up the event loop, the process lives."""

    def __init__(self) -> None:
        self._connections: set[Connection] = set()
        self._changing = threading.Lock()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, interval_s: float) -> None:
        """Begins."""
        self._thread = threading.Thread(target=self._run, args=(interval_s,), name="beats", daemon=True)
        self._thread.start()

    def add(self, connection: Connection) -> None:
        """Beats on it from now on until it ends."""
        with self._changing:
            self._connections.add(connection)

    def stop(self) -> None:
        """Ends the thread."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, interval_s: float) -> None:
        while not self._done.wait(interval_s):
            with self._changing:
                self._connections = {each for each in self._connections if each.is_open}
                connections = tuple(self._connections)
            for connection in connections:
                connection.beat()


def beat_interval(silence_s: float) -> float:
    """Seconds between two beats of one end, where the other one calls it gone after `silence_s` without any."""
    return min(2.0, silence_s / 6)


async def hang_up_on_the_silent(connections: Callable[[], list[Connection]], silence_s: float) -> None:
    """Watches over `connections()` for ever: hangs up on each from which nothing has come for `silence_s`.

    A gap of more than two beats between two looks was this process's own: it was stopped, or had no processor.
    """
    interval_s = beat_interval(silence_s)
    loop = asyncio.get_running_loop()
    before = loop.time()
    while True:
        await asyncio.sleep(interval_s)
        now = loop.time()
        passed_s, before = min(now - before, 2 * interval_s), now
        for connection in connections():
            connection.quiet_s += passed_s
            if connection.quiet_s > silence_s:
                connection.hang_up(f"nothing heard for {silence_s:g} s", silent=True)
