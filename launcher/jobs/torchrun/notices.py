"""What the hosts of a job say to one another where nobody starts them but the user: a JSON object a line, over TCP.

Both ends prove first that they know the token that lies in the run's folder, see `launcher.jobs.agents.handshake`: hosts
that do not share that folder cannot train one run. Who comes then says hello. The answer is a notice. From then on the one
who came tells how its agent is, and the other one sends each new notice. An empty object is a beat.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import RunError
from launcher.jobs.agents.handshake import Seal, StrangerError, answer, new_nonce, take_answer

BEAT_S = 1.0
_LONGEST_LINE = 1 << 22
_TOKEN_BYTES = 16
_TOKEN_S, _LOOK_S = 5.0, 0.05


class NoNodeError(Exception):
    """Who was asked says something else, or nothing; the message says what. `silent_s`: how long nothing was heard before."""

    def __init__(self, message: str, *, silent_s: float = 0.0) -> None:
        super().__init__(message)
        self.silent_s = silent_s


@dataclass(frozen=True, kw_only=True)
class NodeHello:
    """The first word of a host that comes."""

    host: str
    """Its name in the job."""
    rank: int
    """Its place among the hosts."""
    process: str
    """Made up by the process: two that claim the same place are not one."""
    only_asks: bool
    """Whether it wants one notice and no more."""


@dataclass(frozen=True, kw_only=True)
class AgentOrder:
    """An agent to run on each of `hosts`."""

    key: str
    """Of the attempt, of one supervisor."""
    hosts: tuple[str, ...]
    environ: Mapping[str, str]
    output: str
    """File that takes what it prints."""


@dataclass(frozen=True, kw_only=True)
class AgentStatus:
    """An agent that a host has started."""

    key: str
    code: int | None
    """Its exit code; None while it runs."""


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What a host says of itself, and, where it leads, of the job."""

    host: str
    leads: bool = False
    has_taken_part: bool = False
    """Whether it has followed or led since it was started: then the job is under way."""
    order: AgentOrder | None = None
    end: int | None = None
    """Exit code of the job once it has ended."""
    cause: str | None = None
    """Of an end that is no good one."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """To somebody who does not belong here."""

    why: str = field(default="")


Word = NodeHello | AgentStatus | Notice | Refusal


def encode(word: Word | None) -> bytes:
    """One line, without its end; None is a beat."""
    return json.dumps({} if word is None else {type(word).__name__: asdict(word)}).encode()


def decode(line: bytes) -> Word | None:
    """What `encode` was given. Raises NoNodeError where it is none of these."""
    try:
        data: dict[str, Any] = json.loads(line)
        if not data:
            return None
        ((name, values),) = data.items()
        if name == "Notice" and values["order"] is not None:
            order = values["order"]
            values["order"] = AgentOrder(**{**order, "hosts": tuple(order["hosts"])})
        kinds = {kind.__name__: kind for kind in (NodeHello, AgentStatus, Notice, Refusal)}
        word: Word = kinds[name](**values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NoNodeError(f"it says {line[:60]!r}, which no `mega launch` would") from error
    return word


class Wire:
    """One end of a connection between two hosts, each of which has proved that it knows the token."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seal: Seal) -> None:
        self._reader = reader
        self._writer = writer
        self._seal = seal

    @classmethod
    async def answer(
        cls, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, token: str, timeout_s: float
    ) -> Wire:
        """Meets somebody who has come. Raises NoNodeError where that is none of ours, as far as it shows by now."""
        try:
            words, seal = answer(token, await _read_line(reader, silence_s=timeout_s))
        except StrangerError as error:
            raise NoNodeError(str(error)) from error
        writer.write(words + b"\n")
        return cls(reader, writer, seal)

    @classmethod
    async def come(
        cls, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, token: str, timeout_s: float
    ) -> Wire:
        """Meets whoever listens. Raises NoNodeError where that one does not know the token."""
        nonce = new_nonce()
        writer.write(nonce + b"\n")
        line = await _read_line(reader, silence_s=timeout_s)
        try:
            return cls(reader, writer, take_answer(token, nonce, line))
        except StrangerError as error:
            raise NoNodeError(
                "it launches another run, or this one in another folder: do all hosts see the run's folder at the same place, "
                "on a shared file system?"
            ) from error

    def write(self, word: Word | None) -> None:
        """Sends it, in time; None is a beat."""
        self._writer.write(self._seal.seal(encode(word)) + b"\n")

    async def read(self, *, silence_s: float) -> Word | None:
        """The next word; None is a beat. Raises NoNodeError at the end, and where nothing sensible comes for `silence_s`."""
        line = await _read_line(self._reader, silence_s=silence_s)
        try:
            return decode(self._seal.open(line))
        except StrangerError as error:
            raise NoNodeError(str(error)) from error

    async def drain(self) -> None:
        """Waits until the other end has taken enough."""
        await self._writer.drain()

    def close(self) -> None:
        """Hangs up."""
        self._writer.close()


async def _read_line(reader: asyncio.StreamReader, *, silence_s: float) -> bytes:
    """Only time in which this process itself runs counts as silence: it may be stopped, or have no processor."""
    loop = asyncio.get_running_loop()
    quiet_s = 0.0
    reading = asyncio.ensure_future(reader.readline())
    try:
        while not reading.done():
            before = loop.time()
            await asyncio.wait((reading,), timeout=BEAT_S)
            quiet_s += min(loop.time() - before, 2 * BEAT_S)
            if quiet_s >= silence_s and not reading.done():
                raise NoNodeError(f"nothing heard for {silence_s:g} s", silent_s=silence_s)
        line = reading.result()
    except (OSError, ValueError) as error:  # ValueError: a line that is too long
        raise NoNodeError(str(error)) from error
    finally:
        reading.cancel()
    if not line.endswith(b"\n"):
        raise NoNodeError("its connection ended")
    return line[:-1]


async def connect(host: str, port: int, hello: NodeHello, *, token: str, timeout_s: float) -> tuple[Wire, Notice]:
    """Says hello at `host`; returns its notice too. Raises NoNodeError where there is none."""
    try:
        opening = asyncio.open_connection(host, port, limit=_LONGEST_LINE)
        reader, writer = await asyncio.wait_for(opening, timeout_s)
    except TimeoutError:
        raise NoNodeError(f"no answer within {timeout_s:g} s") from None
    except OSError as error:
        raise NoNodeError(error.strerror or str(error)) from error
    try:
        wire = await Wire.come(reader, writer, token=token, timeout_s=timeout_s)
        wire.write(hello)
        notice = await wire.read(silence_s=timeout_s)
        if isinstance(notice, Refusal):
            raise NoNodeError(notice.why)
        if not isinstance(notice, Notice):
            raise NoNodeError("it does not begin with a notice")
    except BaseException:
        writer.close()
        raise
    return wire, notice


def shared_token(folder: Path) -> str:
    """The token that lies in `folder`: made by the host that comes first, read by the others. Raises RunError where it stays
    empty."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "token"
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(_TOKEN_BYTES))
    deadline = time.monotonic() + _TOKEN_S
    while not (token := path.read_text(encoding="utf-8")):
        if time.monotonic() > deadline:
            raise RunError(f"{path} is empty: who should have written it was interrupted; remove it")
        time.sleep(_LOOK_S)
    return token
