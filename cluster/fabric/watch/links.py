"""The connections between watchers and the head. They come and go; a run is not disturbed by that."""

from __future__ import annotations

import errno
import logging
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

from cluster.fabric.watch.head import Head
from cluster.fabric.watch.protocol import LineConnection, Meeting, Message

_logger = logging.getLogger(__name__)
_CONNECT_AGAIN_SECONDS = 2.0
_TICK_SECONDS = 1.0
_LAST_WORD_SECONDS = 1.0
_BACKLOG = 1024
HERE = "here"
"""The head's word once a second: a host that is gone leaves its connections open."""
OVER = "over"
"""Its last one."""


class HeadServer:
    """Where the head listens: on the address that the others are told, where this host has it; else on all of its own."""

    def __init__(self, address: str, token: str) -> None:
        self._token = token
        self._listener = _listen(address)
        self._listener.setblocking(False)
        self._connections: dict[LineConnection, Callable[[int], None]] = {}
        self._is_full = False
        self._has_complained = False

    @property
    def port(self) -> int:
        """The TCP port."""
        return int(self._listener.getsockname()[1])

    def serve(self, head: Head, selector: selectors.BaseSelector) -> LocalHead:
        """From now on what comes goes to `head`. Returns how the watcher of this host speaks to it."""
        self._head = head
        self._selector = selector
        selector.register(self._listener, selectors.EVENT_READ, self._accept)
        return LocalHead(self, head)

    def order(self, message: Message) -> None:
        """Says something to the watchers of all other hosts."""
        for connection in list(self._connections):
            connection.put(message)
            self._flush(connection)

    def tick(self) -> None:
        """Says that the head lives, and hears newcomers again where there was no room for them."""
        if self._is_full:
            self._is_full = False
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self.order({"t": HERE})

    def close(self) -> None:
        """Hangs up, and says that this is meant."""
        self.order({"t": OVER})
        for connection in list(self._connections):
            self._drop(connection)
        self._listener.close()

    def _accept(self, mask: int) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._say_full(error)
            return
        connection = LineConnection(accepted, self._token)
        self._connections[connection] = lambda mask: self._hear(connection, mask)
        self._selector.register(connection.socket, selectors.EVENT_READ, self._connections[connection])

    def _say_full(self, error: OSError) -> None:
        """Nobody can come in until `tick`; a listener that is left alone would wake this process without end."""
        self._selector.unregister(self._listener)
        self._is_full = True
        if not self._has_complained:
            self._has_complained = True
            _logger.warning(
                "the head of the watch has %d hosts and no room for another (%s): ranks of those left out will seem unheard; "
                "raise the limit of open files (ulimit -n)",
                len(self._connections),
                error,
            )

    def _hear(self, connection: LineConnection, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self._flush(connection)
        if connection not in self._connections or not mask & selectors.EVENT_READ:
            return
        try:
            for message in connection.messages():
                self._head.on_message(message, time.monotonic())
        except OSError:
            self._drop(connection)
        except (LookupError, TypeError, AttributeError, ValueError):
            _logger.warning("the head of the watch hangs up on a watcher that it does not understand", exc_info=True)
            self._drop(connection)

    def _flush(self, connection: LineConnection) -> None:
        try:
            connection.flush()
        except OSError:
            self._drop(connection)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.has_unsent else 0)
        self._selector.modify(connection.socket, events, self._connections[connection])

    def _drop(self, connection: LineConnection) -> None:
        if self._connections.pop(connection, None) is not None:
            self._selector.unregister(connection.socket)
            connection.close()


class LocalHead:
    """The head as its own host's watcher speaks to it."""

    def __init__(self, server: HeadServer, head: Head) -> None:
        self._server = server
        self._head = head
        self._ticked = time.monotonic()

    @property
    def is_over(self) -> bool:
        """All ranks of the run have ended in good order."""
        return self._head.is_over

    def silent_s(self, now: float) -> float:
        """The head is here."""
        return 0.0

    def put(self, message: Message) -> None:
        """Says something."""
        self._head.on_message(message, time.monotonic())

    def tick(self, now: float) -> None:
        """Time goes by."""
        if now >= self._ticked + _TICK_SECONDS:
            self._ticked = now
            self._server.tick()
            self._head.tick(now)

    def close(self, now: float) -> None:
        """The last word."""
        try:
            self._head.close(now)
        finally:
            self._server.close()


class HeadLink:
    """A watcher's connection to the head on another host; it is made again whenever it is lost."""

    def __init__(self, meeting: Meeting, selector: selectors.BaseSelector, obey: Callable[[Message], None]) -> None:
        self._meeting = meeting
        self._selector = selector
        self._obey = obey
        self._connection: LineConnection | None = None
        self._tried = time.monotonic() - _CONNECT_AGAIN_SECONDS
        self._latest: dict[Any, Message] = {}
        self._heard = time.monotonic()
        self._is_head_over = False

    @property
    def is_over(self) -> bool:
        """This side knows of its own ranks alone."""
        return True

    def silent_s(self, now: float) -> float:
        """Since when the head has said nothing, in seconds; 0 where it has taken its leave."""
        return 0.0 if self._is_head_over else now - self._heard

    def put(self, message: Message) -> None:
        """Says something, or keeps the latest of its kind until the head can be reached."""
        if self._connection is None:
            self._latest[message["t"], message.get("rank")] = message
            return
        self._connection.put(message)
        self._flush()

    def tick(self, now: float) -> None:
        """Tries to connect where there is no connection."""
        if self._connection is None and now >= self._tried + _CONNECT_AGAIN_SECONDS:
            self._tried = now
            self._connect()

    def close(self, now: float) -> None:
        """Waits a moment for the last word to leave."""
        deadline = now + _LAST_WORD_SECONDS
        while self._connection is not None and self._connection.has_unsent and time.monotonic() < deadline:
            self._selector.select(0.1)
            self._flush()
        self._drop()

    def _connect(self) -> None:
        try:
            sock = socket.create_connection((self._meeting.address, self._meeting.port), timeout=_LAST_WORD_SECONDS)
        except OSError:
            return
        self._connection = LineConnection(sock, self._meeting.token)
        self._selector.register(sock, selectors.EVENT_READ, self._on_event)
        kept, self._latest = self._latest, {}
        for message in kept.values():
            self.put(message)

    def _on_event(self, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self._flush()
        if self._connection is None or not mask & selectors.EVENT_READ:
            return
        try:
            for message in self._connection.messages():
                self._heard = time.monotonic()
                self._is_head_over = message["t"] == OVER
                self._obey(message)
        except OSError:
            self._drop()

    def _flush(self) -> None:
        if self._connection is None:
            return
        try:
            self._connection.flush()
        except OSError:
            self._drop()
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._connection.has_unsent else 0)
        self._selector.modify(self._connection.socket, events, self._on_event)

    def _drop(self) -> None:
        if self._connection is not None:
            self._selector.unregister(self._connection.socket)
            self._connection.close()
            self._connection = None


def _listen(address: str) -> socket.socket:
    try:
        found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    for family, kind, protocol, _, place in found:
        listener = socket.socket(family, kind, protocol)
        try:
            listener.bind(place)
            listener.listen(_BACKLOG)
        except OSError:  # a name that stands for somebody else here, as behind a translator of addresses
            listener.close()
            continue
        return listener
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
    return socket.create_server(("", 0), backlog=_BACKLOG)
