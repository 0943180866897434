"""Where the hosts of a job come together: each listens, and the one that leads keeps the others' connections."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from launcher.errors import RunError
from launcher.jobs.torchrun.notices import (
    BEAT_S,
    AgentStatus,
    NodeHello,
    NoNodeError,
    Notice,
    Refusal,
    Wire,
)

_HELLO_S = 10.0


@dataclass(eq=False, kw_only=True)
class _Visitor:
    """A host that is there."""

    hello: NodeHello
    wire: Wire
    heard_at: float
    """By the monotonic clock."""
    status: AgentStatus | None = None


class Meeting:
    """One host's end. `notice` is what it tells; `silence_s` is the time after which a host that says nothing is gone."""

    def __init__(self, *, token: str, host: str, silence_s: float, say: Callable[[str], None]) -> None:
        self.notice = Notice(host=host)
        self._token = token
        self._silence_s = silence_s
        self._say = say
        self._visitors: dict[str, _Visitor] = {}
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._serving: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    @property
    def port(self) -> int:
        """At which this host listens."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def open(self, port: int) -> None:
        """Listens at `port` of all addresses; 0: at any free one. Raises RunError where somebody else does."""
        try:
            listener = _listen(port)
        except OSError as error:
            raise RunError(
                f"port {port} cannot be listened at here ({error.strerror}): does `mega launch` of this run run on this host "
                "already? Else give another port with --rendezvous HOST:PORT, on all hosts"
            ) from error
        self._server = await asyncio.start_server(self._serve, sock=listener)

    async def close(self) -> None:
        """Hangs up on all."""
        if self._server is not None:
            self._server.close()
        for writer in self._serving.values():
            writer.close()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def tell(self, **changes: Any) -> None:
        """Changes the notice, and sends it to all who are there."""
        self.notice = replace(self.notice, **changes)
        for visitor in self._visitors.values():
            visitor.wire.write(self.notice)

    def hosts(self) -> tuple[str, ...]:
        """Those that are there, in the order of their ranks."""
        return tuple(sorted(self._visitors, key=lambda host: self._visitors[host].hello.rank))

    def rank(self, host: str) -> int:
        """Of a host that is there: its place among all."""
        return self._visitors[host].hello.rank

    def status(self, host: str) -> AgentStatus | None:
        """Of the agent of a host, as it was told last; None where there is none, or the host is not there."""
        return self._visitors[host].status if host in self._visitors else None

    async def until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Waits for what a change of hosts or of their agents brings about; returns whether it did."""
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await self._changed.wait()
        except TimeoutError:
            return condition()
        return True

    def poke(self) -> None:
        """Has all conditions looked at again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving[task] = writer
        try:
            with contextlib.suppress(NoNodeError, OSError):
                await self._welcome(await Wire.answer(reader, writer, token=self._token, timeout_s=_HELLO_S))
        finally:
            del self._serving[task]
            writer.close()

    async def _welcome(self, wire: Wire) -> None:
        hello = await wire.read(silence_s=_HELLO_S)
        if not isinstance(hello, NodeHello):
            raise NoNodeError("no hello")
        refusal = self._refusal(hello)
        wire.write(self.notice if refusal is None else Refusal(why=refusal))
        if refusal is not None or hello.only_asks or not self.notice.leads:
            await wire.drain()
            return
        visitor = _Visitor(hello=hello, wire=wire, heard_at=time.monotonic())
        if (earlier := self._visitors.pop(hello.host, None)) is not None:
            earlier.wire.close()
        self._visitors[hello.host] = visitor
        self.poke()
        beats = asyncio.create_task(_beat(wire))
        try:
            while True:
                word = await wire.read(silence_s=self._silence_s)
                visitor.heard_at = time.monotonic()
                if isinstance(word, AgentStatus) and word != visitor.status:
                    visitor.status = word
                    self.poke()
        finally:
            beats.cancel()
            if self._visitors.get(hello.host) is visitor:
                del self._visitors[hello.host]
            self.poke()

    def _refusal(self, hello: NodeHello) -> str | None:
        other = self._visitors.get(hello.host)
        if other is None or other.hello.process == hello.process:
            return None
        # One whose host has lost its power is silent; it may be the same host that is back.
        if time.monotonic() - other.heard_at > 4 * BEAT_S:
            return None
        return f"another process is there already as {hello.host}: does `mega launch` run twice on that host?"


async def _beat(wire: Wire) -> None:
    while True:
        await asyncio.sleep(BEAT_S)
        wire.write(None)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
            # IPv6 may be compiled in and switched off.
    return socket.create_server(("", port))
