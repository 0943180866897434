"""The side channel: rank 0 asks, every rank answers, and both ends know whether the other is alive.

A plain TCP connection from each rank to rank 0 carries one JSON object a line. No collective library is in it, so that it
works when that hangs; each end has a thread of its own for it, so that a rank in a long measurement is told from one that
is stopped; and a rank that dies closes its connection, which is seen at once. Imports without torch.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from cluster.errors import FabricError
from cluster.fabric.probing import UnresponsiveError

Message = dict[str, Any]

_BEAT_S = 0.5
_SEND_S = 5.0
_SETTLE_S = 0.5
"""After one rank is found gone: ranks that went with it are to be named with it."""
_LONGEST_HELLO, _LONGEST_LINE = 1 << 16, 1 << 26
"""Bytes of a line: of one who has not said yet who he is, and of one who has. Lists of 100,000 ranks fit in the latter."""
_NAMELESS_S = 60.0
"""So long somebody may be connected without a hello. A rank first looks for its devices, which may take a while."""
_PATIENCE_WITH_RANK_0 = 5
"""A rank waits so many times longer for a sign of rank 0 than rank 0 for one of it: the verdict comes from rank 0."""


class Peer:
    """One end of a connection. `send` may be called from any thread, `receive` from one."""

    def __init__(self, connection: socket.socket, *, longest: int = _LONGEST_LINE) -> None:
        connection.settimeout(_SEND_S)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.rank: int | None = None
        """Which rank it is, once it has said so and was welcome."""
        self.longest = longest
        """Bytes that a line may have. Who sends more is hung up on."""
        self.quiet_s = 0.0
        """How long nothing has come, in time that this process itself ran."""
        self.age_s = 0.0
        """How long it has been connected, in such time."""
        self._sending = threading.Lock()
        self._rest = b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Raises OSError where the other end is gone, or takes nothing for five seconds."""
        with self._sending:
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message]:
        """What has come since; call it when there is something to read.

        Raises OSError or EOFError at the end, and EOFError where that does not speak our language, whoever it is.
        """
        data = self.connection.recv(1 << 16)
        if not data:
            raise EOFError
        self.quiet_s = 0.0
        *lines, self._rest = (self._rest + data).split(b"\n")
        if max(map(len, (*lines, self._rest))) > self.longest:
            raise EOFError
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:  # brackets by the thousand are JSON too
            raise EOFError from error
        if not all(isinstance(message, dict) for message in messages):
            raise EOFError
        return messages

    def wait(self, passed_s: float) -> float:
        """Adds to the time that nothing has come. A gap of more than two beats was this process's own: it was stopped."""
        own_s = min(passed_s, 2 * _BEAT_S)
        self.quiet_s += own_s
        self.age_s += own_s
        return self.quiet_s

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


class Hub:
    """Rank 0's end of all connections.

    Anybody in the network may come to its port: what counts is said by those that know the token, each for its own rank.
    """

    def __init__(
        self, *, world_size: int, token: str, silence_s: float, family: socket.AddressFamily, address: str = ""
    ) -> None:
        """`address`: the one of this host to listen at; empty for all of them. Raises OSError where that cannot be."""
        self.hellos: dict[int, Message] = {}
        """What each rank said of itself, by rank."""
        self.reached_at: dict[int, str] = {}
        """At which address of this host each rank came in."""
        self._world_size = world_size
        self._token = token
        self._silence_s = silence_s
        self._peers: dict[int, Peer] = {}
        self._nameless: set[Peer] = set()
        self._gone: set[int] = set()
        self._replies: dict[int, Message] = {}
        self._number = 0
        self._full = False
        self._trouble = ""
        self._ended = False
        self._changed = threading.Condition()
        self._listener = socket.create_server((address, 0), family=family, backlog=1024)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._listen, name="fabric-hub", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.getsockname()[1])

    def attach(self) -> socket.socket:
        """The far end of a connection for rank 0's own measuring side, which is in this process."""
        near, far = socket.socketpair()
        self._selector.register(near, selectors.EVENT_READ, Peer(near))
        return far

    def gather(self, timeout_s: float) -> tuple[int, ...]:
        """Waits until all ranks have said hello; returns those that have not in time. Then nobody comes in any more.

        Raises FabricError where ranks that have come cannot be let in: they are not missing.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._trouble or len(self.hellos) == self._world_size, timeout_s)
            self._full = True
            if self._trouble:
                raise FabricError(self._trouble)
            return tuple(rank for rank in range(self._world_size) if rank not in self.hellos)

    def tell(self, rank: int, message: Mapping[str, Any]) -> None:
        """Sends to one rank; one that cannot be reached counts as gone."""
        try:
            self._peers[rank].send(message)
        except OSError:
            with self._changed:
                self._gone.add(rank)

    def ask(self, commands: Mapping[int, Message], *, timeout_s: float, during: str) -> dict[int, Message]:
        """Each rank's answer to its own command.

        Raises UnresponsiveError as soon as any rank is gone, asked or not, and when one has not answered within
        `timeout_s` and the time after which it would count as silent.
        """
        with self._changed:
            self._number += 1
            self._replies.clear()
        for rank, command in commands.items():
            self.tell(rank, {**command, "number": self._number})
        with self._changed:
            self._changed.wait_for(
                lambda: self._gone or len(self._replies) == len(commands), timeout_s + self._silence_s
            )
            if self._gone:
                self._changed.wait_for(lambda: False, _SETTLE_S)
                raise UnresponsiveError(sorted(self._gone), during)
            if silent := sorted(commands.keys() - self._replies.keys()):
                raise UnresponsiveError(silent, during)
            return dict(self._replies)

    def stop(self, *, clean: bool) -> None:
        """Sends all ranks home, gives those that are there a moment to say goodbye, and closes."""
        timeout_s = 2.0 if clean else _SETTLE_S
        with self._changed:
            self._number += 1
            self._replies.clear()
            there = self._peers.keys() - self._gone
        for rank in there:
            self.tell(rank, {"do": "stop", "clean": clean, "number": self._number})
        with self._changed:
            self._changed.wait_for(lambda: not there - self._gone - self._replies.keys(), timeout_s)
            self._ended = True
        self._thread.join(2 * _BEAT_S + _SEND_S)
        for peer in (*self._peers.values(), *self._nameless):
            peer.close()
        self._listener.close()
        self._selector.close()

    def _listen(self) -> None:
        beaten = looked = time.monotonic()
        while not self._ended:
            before, looked = looked, time.monotonic()
            for peer in self._peers.values():
                peer.wait(looked - before)
            for peer in list(self._nameless):
                peer.wait(looked - before)
                if peer.age_s > _NAMELESS_S:
                    self._hang_up(peer)
            for key, _ in self._selector.select(_BEAT_S):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.data)
            with self._changed:
                silent = {rank for rank, peer in self._peers.items() if peer.quiet_s > self._silence_s}
                if not silent <= self._gone:
                    self._gone |= silent
                    self._changed.notify_all()
            if looked - beaten >= _BEAT_S:
                beaten = looked
                for rank in self._peers.keys() - self._gone:
                    self.tell(rank, {"alive": True})

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                # It would be told of the same newcomer again and again.
                self._selector.unregister(self._listener)
                with self._changed:
                    self._trouble = (
                        f"rank 0 may open no more files ({error.strerror}) with {len(self._peers)} of "
                        f"{self._world_size} ranks there: raise its limit (ulimit -n)"
                    )
                    self._changed.notify_all()
            return
        peer = Peer(connection, longest=_LONGEST_HELLO)
        self._nameless.add(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _read(self, peer: Peer) -> None:
        try:
            for message in peer.receive():
                self._take(peer, message)
        except (OSError, EOFError):
            self._hang_up(peer)

    def _take(self, peer: Peer, message: Message) -> None:
        """Raises EOFError for what no rank of ours would say."""
        if peer.rank is None:
            hello = message.get("hello")
            if not isinstance(hello, dict):
                raise EOFError
            self._welcome(peer, hello)
        elif "number" in message:
            if message.get("rank") != peer.rank:
                raise EOFError
            with self._changed:
                if message["number"] == self._number:
                    self._replies[peer.rank] = message
                    self._changed.notify_all()

    def _hang_up(self, peer: Peer) -> None:
        self._nameless.discard(peer)
        self._selector.unregister(peer.connection)
        peer.close()
        if peer.rank is not None:
            with self._changed:
                self._gone.add(peer.rank)
                self._changed.notify_all()

    def _welcome(self, peer: Peer, hello: Message) -> None:
        rank = hello.get("rank")
        if not hmac.compare_digest(str(hello.get("token")).encode(errors="replace"), self._token.encode()):
            refusal = "it belongs to another run"
        elif not isinstance(rank, int) or not 0 <= rank < self._world_size:
            refusal = f"there is no rank {rank} of {self._world_size}"
        elif rank in self._peers:
            refusal = f"rank {rank} is there already: two processes have the same rank"
        elif self._full:
            refusal = "it came after the others had stopped waiting; raise the time-out"
        else:
            self._nameless.discard(peer)
            peer.rank, peer.longest = rank, _LONGEST_LINE
            with self._changed:
                self._peers[rank] = peer
                self.hellos[rank] = hello
                if peer.connection.family != socket.AF_UNIX:
                    self.reached_at[rank] = peer.connection.getsockname()[0]
                self._changed.notify_all()
            return
        with contextlib.suppress(OSError):
            peer.send({"refused": refusal})


class Line:
    """A rank's end of its connection to rank 0.

    `interrupt` is called, in a thread, when nothing more will come and the rank's last measurement may hang.
    """

    def __init__(
        self, connection: socket.socket, hello: Message, *, silence_s: float, interrupt: Callable[[], None]
    ) -> None:
        self._rank = hello["rank"]
        self._patience_s = _PATIENCE_WITH_RANK_0 * silence_s
        self._peer = Peer(connection)
        self._interrupt = interrupt
        self._clean = False
        self._commands: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.ended = threading.Event()
        """Set when rank 0 has sent this rank home, or is gone."""
        self.stopped = False
        """Whether it was sent home."""
        self.loss = ""
        """Why rank 0 is gone, for the user."""
        self._peer.send({"hello": hello})
        self._thread = threading.Thread(target=self._listen, name="fabric-line", daemon=True)
        self._thread.start()

    def next_command(self) -> Message:
        """The next command; waits for it. Raises FabricError when rank 0 is gone."""
        command = self._commands.get()
        if command.get("do") == "lost":
            raise FabricError(self.loss)
        return command

    def reply(self, number: int, message: Mapping[str, Any]) -> None:
        """Answers command `number`. That rank 0 is gone shows at the next command."""
        with contextlib.suppress(OSError):
            self._peer.send({**message, "number": number, "rank": self._rank})

    def close(self) -> None:
        """Hangs up."""
        self._peer.close()
        self._thread.join(_SEND_S)

    def _listen(self) -> None:
        beaten = looked = time.monotonic()
        selector = selectors.DefaultSelector()
        selector.register(self._peer.connection, selectors.EVENT_READ)
        while not self.ended.is_set():
            before, looked = looked, time.monotonic()
            self._peer.wait(looked - before)
            try:
                if selector.select(_BEAT_S):
                    for message in self._peer.receive():
                        self._take(message)
                if looked - beaten >= _BEAT_S:
                    beaten = looked
                    self._peer.send({"alive": True})
                if self._peer.quiet_s > self._patience_s:
                    self._lose(f"rank 0 has given no sign of life for {self._patience_s:g} s")
            except (OSError, EOFError):
                self._lose("rank 0 has ended, or its host cannot be reached any more")
        selector.close()
        if not self._clean:
            self._interrupt()

    def _take(self, message: Message) -> None:
        if "refused" in message:
            self._lose(f"rank 0 refuses this process: {message['refused']}")
        elif "do" in message:
            self._commands.put(message)
            if message["do"] == "stop":
                self.stopped = True
                self._clean = message["clean"]
                self.ended.set()

    def _lose(self, reason: str) -> None:
        if not self.ended.is_set():
            self.loss = f"rank {self._rank} lost the others: {reason}; look at what rank 0 says"
            self.ended.set()
            self._commands.put({"do": "lost"})
