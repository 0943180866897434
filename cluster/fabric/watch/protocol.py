"""How the parts of a watch talk: datagrams on a host, lines of JSON between hosts. Every word is signed with the run's token.

On a host: sockets of the kernel's abstract names, so that no file is left behind, whoever is killed. Between hosts: TCP.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import select
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

DATAGRAM_BYTES = 160_000
"""Kernels send datagrams of about 200 kB without being asked for more."""
_LINE_BYTES = 4_000_000
"""A peer that sends a longer line is none of ours."""
_FIRST_LINE_BYTES = 2 * DATAGRAM_BYTES
"""The same for its first line, before which it may be a stranger: what ranks say to their watcher fits."""
_SIGNATURE_BYTES = 32
Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """What rank 0's watcher tells all ranks: where the head listens, and the secret that says who belongs to the run."""

    address: str
    port: int
    token: str
    host: str
    """Rank 0's, by name."""

    def as_text(self) -> str:
        """For `exchange`."""
        return json.dumps([self.address, self.port, self.token, self.host])

    @classmethod
    def from_text(cls, text: str) -> Meeting:
        """What `as_text` wrote."""
        address, port, token, host = json.loads(text)
        return cls(address=address, port=port, token=token, host=host)


class HasFile(Protocol):
    """A socket, a pipe."""

    def fileno(self) -> int:
        """The number of its file."""


def is_readable(source: HasFile, seconds: float) -> bool:
    """Whether something comes within that time. By poll: select knows no file beyond the 1,024th, and a rank of a large
    world has one for each other rank."""
    poll = select.poll()
    poll.register(source.fileno(), select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def watcher_name(token: str, host: str) -> str:
    """Where the watcher of a host hears the ranks."""
    return f"\0mega-watch-{_public(token)}-{host}"[:100]


def rank_name(token: str, rank: int) -> str:
    """Where a rank hears its watcher."""
    return f"\0mega-watch-{_public(token)}-rank-{rank}"


def _public(token: str) -> str:
    """Names a run to the whole machine without giving its secret away."""
    return hashlib.sha256(token.encode()).hexdigest()[:16]


def local_socket(name: str) -> socket.socket:
    """A datagram socket of that name, which never waits. Raises OSError where another process has the name."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sock.bind(name)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def send_datagram(sock: socket.socket, name: str, token: str, message: Mapping[str, Any]) -> bool:
    """Whether it could be sent: somebody listens there, has room, and it is not too long."""
    data = _signed(message, token)
    if len(data) > DATAGRAM_BYTES:
        return False
    try:
        sock.sendto(data, name)
    except OSError:
        return False
    return True


def receive_datagrams(sock: socket.socket, token: str) -> Iterator[Message]:
    """All that has come, from those who know the token."""
    while True:
        try:
            data = sock.recv(DATAGRAM_BYTES)
        except OSError:  # nothing more
            return
        if (message := _authentic(data, token)) is not None:
            yield message


class LineConnection:
    """A TCP connection that carries one message a line, and never waits."""

    def __init__(self, sock: socket.socket, token: str) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self._token = token
        self._received = bytearray()
        self._unsent = bytearray()
        self._is_known = False

    @property
    def has_unsent(self) -> bool:
        """Whether `flush` has something to do."""
        return bool(self._unsent)

    @property
    def _longest(self) -> int:
        return _LINE_BYTES if self._is_known else _FIRST_LINE_BYTES

    def put(self, message: Mapping[str, Any]) -> None:
        """Queues a message. What a peer has not taken for long is dropped whole lines at a time."""
        line = _signed(message, self._token) + b"\n"
        if len(self._unsent) + len(line) <= _LINE_BYTES:
            self._unsent += line

    def flush(self) -> None:
        """Sends as much as goes now. Raises OSError when the connection is gone."""
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                del self._unsent[: self.socket.send(self._unsent)]

    def messages(self) -> Iterator[Message]:
        """All whole messages that have come. Raises OSError when the connection is gone, or is none of ours."""
        ended = False
        with contextlib.suppress(BlockingIOError):
            while not ended and len(self._received) < self._longest:
                data = self.socket.recv(1 << 16)
                self._received += data
                ended = not data
        *lines, rest = self._received.split(b"\n")
        self._received = bytearray(rest)
        for line in lines:
            message = _authentic(bytes(line), self._token)
            if message is None:
                raise ConnectionAbortedError("a word without the run's signature")
            self._is_known = True
            yield message
        if ended or len(self._received) >= self._longest:
            raise ConnectionResetError("the other end is gone")

    def close(self) -> None:
        """Ends the connection."""
        self.socket.close()


def _signed(message: Mapping[str, Any], token: str) -> bytes:
    """The message after its HMAC-SHA256 with the token, which itself is never sent: nothing is made of what comes from those
    who do not know it."""
    data = json.dumps(message, separators=(",", ":")).encode()
    return _signature(data, token) + data


def _signature(data: bytes, token: str) -> bytes:
    return hmac.digest(token.encode(), data, "sha256").hex()[:_SIGNATURE_BYTES].encode()


def _authentic(data: bytes, token: str) -> Message | None:
    words = data[_SIGNATURE_BYTES:]
    if not hmac.compare_digest(data[:_SIGNATURE_BYTES], _signature(words, token)):
        return None
    try:
        message = json.loads(words)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
