"""Words between the parts of a watch."""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket

import pytest

from cluster.fabric.watch.protocol import (
    DATAGRAM_BYTES,
    LineConnection,
    Meeting,
    local_socket,
    rank_name,
    receive_datagrams,
    send_datagram,
    watcher_name,
)

TOKEN = "a" * 32


def test_datagrams_reach_a_name_once_somebody_has_it() -> None:
    name, own = f"\0mega-test-{os.getpid()}", f"\0mega-test-{os.getpid()}-own"
    with local_socket(own) as sender:
        assert not send_datagram(sender, name, TOKEN, {"t": "x"})
        with local_socket(name) as receiver:
            assert send_datagram(sender, name, TOKEN, {"t": "x", "n": 1})
            assert send_datagram(sender, name, "another", {"t": "y"})
            assert not send_datagram(sender, name, TOKEN, {"t": "z" * DATAGRAM_BYTES})
            assert list(receive_datagrams(receiver, TOKEN)) == [{"t": "x", "n": 1}]
            with pytest.raises(OSError, match="in use"):
                local_socket(name)


def _pair(token: str = TOKEN) -> tuple[LineConnection, LineConnection]:
    here, there = socket.socketpair()
    return LineConnection(here, TOKEN), LineConnection(there, token)


def _sign(words: bytes) -> bytes:
    return hmac.digest(TOKEN.encode(), words, "sha256").hex()[:32].encode() + words


def test_the_token_is_not_sent() -> None:
    here, there = _pair()
    here.put({"t": "ranks"})
    here.flush()
    sent = there.socket.recv(1000)
    assert b"ranks" in sent
    assert TOKEN.encode() not in sent
    assert sent[:-1] == _sign(sent[32:-1])


def test_lines_arrive_whole_in_order() -> None:
    here, there = _pair()
    messages = [{"n": number, "text": "x" * 3000} for number in range(50)]
    for message in messages:
        here.put(message)
    received: list[dict[str, object]] = []
    while here.has_unsent or len(received) < 50:
        here.flush()
        received += there.messages()
    assert received == messages
    here.close()
    with pytest.raises(ConnectionResetError):
        list(there.messages())


def test_a_word_without_the_token_ends_the_connection() -> None:
    here, there = _pair(token="b" * 32)
    here.put({"t": "ranks"})
    here.flush()
    with pytest.raises(ConnectionAbortedError):
        list(there.messages())
    here, there = _pair()
    here.socket.send(b"GET / HTTP/1.1\r\n")
    with pytest.raises(ConnectionAbortedError):
        list(there.messages())


@pytest.mark.parametrize("text", [b"[" * 100_000, b"5", b"{", b"\xff"])
def test_what_is_no_message_ends_the_connection_and_nothing_else(text: bytes) -> None:
    for words in (text, TOKEN.encode() + text, _sign(text)):
        here, there = _pair()
        here.socket.sendall(words + b"\n")
        with pytest.raises(ConnectionAbortedError):
            list(there.messages())


def test_a_stranger_is_cut_off_before_its_line_ends() -> None:
    here, there = _pair()
    here.socket.setblocking(False)
    sent = 0
    with contextlib.suppress(ConnectionResetError):
        while sent < 1_000_000:
            sent += here.socket.send(b"[" * 10_000)
            assert not list(there.messages())
    assert sent < 500_000


def test_datagrams_that_are_no_messages_are_left_out() -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    there.setblocking(False)
    with here, there:
        for data in (b"[" * 50_000, _sign(b"[" * 50_000), _sign(b"5"), b"", b"{}", TOKEN.encode() + b'{"t":"x"}'):
            here.send(data)
        here.send(_sign(b'{"t":"x"}'))
        assert list(receive_datagrams(there, TOKEN)) == [{"t": "x"}]


def test_names_do_not_tell_the_token() -> None:
    token = secrets.token_hex(16)
    assert token[:8] not in watcher_name(token, "h0") + rank_name(token, 3)


def test_a_peer_that_takes_nothing_costs_no_end_of_memory() -> None:
    here, _there = _pair()
    for _ in range(100):
        here.put({"text": "x" * 100_000})
    assert len(here._unsent) <= 4_000_000


def test_a_meeting_travels_as_text() -> None:
    meeting = Meeting(address="fe80::1", port=4711, token=TOKEN, host="h0")
    assert Meeting.from_text(meeting.as_text()) == meeting
