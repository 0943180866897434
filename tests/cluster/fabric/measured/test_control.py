"""The side channel between one hub and lines of the same process."""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.errors import FabricError
from cluster.fabric.measured import control
from cluster.fabric.measured.control import Hub, Line
from cluster.fabric.probing import UnresponsiveError

SILENCE_S = 3.0


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(world_size=2, token="ours", silence_s=SILENCE_S, family=socket.AF_INET)
    yield hub
    hub.stop(clean=False)


def _line(hub: Hub, rank: int, token: str = "ours", connection: socket.socket | None = None) -> Line:
    hello = {"token": token, "rank": rank}
    connection = connection or socket.create_connection(("127.0.0.1", hub.port))
    return Line(connection, hello, silence_s=SILENCE_S, interrupt=lambda: None)


def _let_in(hub: Hub, rank: int) -> None:
    """Waits until the hub has heard who it is."""
    deadline = time.monotonic() + 20.0
    while rank not in hub.hellos:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _answering(line: Line) -> threading.Thread:
    def serve() -> None:
        while (command := line.next_command())["do"] != "stop":
            line.reply(command["number"], {"echo": command["do"]})
        line.reply(command["number"], {})

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread


def test_each_rank_gets_its_own_command_and_its_answer_comes_back(hub: Hub) -> None:
    lines = [_line(hub, 0, connection=hub.attach()), _line(hub, 1)]
    assert hub.gather(10.0) == ()
    threads = [_answering(line) for line in lines]
    answers = hub.ask({0: {"do": "this"}, 1: {"do": "that"}}, timeout_s=10.0, during="a test")
    assert {rank: answer["echo"] for rank, answer in answers.items()} == {0: "this", 1: "that"}
    assert hub.reached_at == {1: "127.0.0.1"}
    hub.stop(clean=True)
    for thread in threads:
        thread.join(10.0)
        assert not thread.is_alive()
    assert all(line.stopped for line in lines)


@pytest.mark.parametrize(
    ("rank", "token", "reason"),
    [
        (1, "theirs", "it belongs to another run"),
        (2, "ours", "there is no rank 2 of 2"),
        (0, "ours", "rank 0 is there already: two processes have the same rank"),
    ],
)
def test_who_does_not_belong_is_refused_with_the_reason(hub: Hub, rank: int, token: str, reason: str) -> None:
    first = _line(hub, 0)
    _let_in(hub, 0)
    assert hub.gather(0.1) == (1,)
    stranger = _line(hub, rank, token)
    with pytest.raises(FabricError, match=f"rank {rank} lost the others: rank 0 refuses this process: {reason}"):
        stranger.next_command()
    assert not first.ended.is_set()


def test_who_comes_too_late_is_told_so(hub: Hub) -> None:
    _line(hub, 0)
    _let_in(hub, 0)
    assert hub.gather(0.1) == (1,)
    with pytest.raises(FabricError, match="it came after the others had stopped waiting; raise the time-out"):
        _line(hub, 1).next_command()


def test_a_rank_whose_connection_ends_is_gone_at_once_asked_or_not(hub: Hub) -> None:
    lines = [_line(hub, 0), _line(hub, 1)]
    hub.gather(10.0)
    _answering(lines[0])
    lines[1].close()

    def ask_until_it_shows() -> None:
        for _ in range(1000):  # its end takes a moment to arrive
            hub.ask({0: {"do": "this"}}, timeout_s=600.0, during="a test")

    with pytest.raises(UnresponsiveError) as caught:
        ask_until_it_shows()
    assert caught.value.ranks == (1,)


def test_a_rank_that_gives_no_sign_of_life_is_gone(hub: Hub) -> None:
    _answering(_line(hub, 0))
    silent = socket.create_connection(("127.0.0.1", hub.port))
    silent.sendall(b'{"hello": {"token": "ours", "rank": 1}}\n')
    assert hub.gather(10.0) == ()
    with pytest.raises(UnresponsiveError, match=r"rank\(s\) 1 did not answer during a test"):
        hub.ask({1: {"do": "this"}}, timeout_s=600.0, during="a test")


def test_a_rank_that_lives_but_does_not_answer_is_named_when_its_time_is_up(hub: Hub) -> None:
    lines = [_line(hub, 0), _line(hub, 1)]
    hub.gather(10.0)
    _answering(lines[0])
    with pytest.raises(UnresponsiveError) as caught:
        hub.ask({0: {"do": "this"}, 1: {"do": "that"}}, timeout_s=0.1, during="a test")
    assert caught.value.ranks == (1,)


def test_a_line_whose_hub_has_ended_says_so() -> None:
    hub = Hub(world_size=1, token="ours", silence_s=SILENCE_S, family=socket.AF_INET)
    interrupted = threading.Event()
    hello: dict[str, Any] = {"token": "ours", "rank": 0}
    connection = socket.create_connection(("127.0.0.1", hub.port))
    line = Line(connection, hello, silence_s=SILENCE_S, interrupt=interrupted.set)
    hub.gather(10.0)
    hub._peers[0].close()
    with pytest.raises(FabricError, match="rank 0 lost the others: rank 0 has ended, or its host cannot be reached"):
        line.next_command()
    assert interrupted.wait(10.0)
    hub.stop(clean=False)


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"5\n",
        b"[" * 60_000 + b"\n",
        b'{"hello": 5}\n',
        b'{"number": 0}\n',
        b'{"number": 1, "rank": 0, "growth": {}}\n',
        b"\xff\n",
        b"x" * (1 << 17),
    ],
    ids=[
        "another protocol",
        "a number",
        "brackets",
        "a hello of 5",
        "no rank",
        "a reply",
        "no text",
        "an endless line",
    ],
)
def test_what_is_not_our_language_is_hung_up_on(hub: Hub, words: bytes) -> None:
    with socket.create_connection(("127.0.0.1", hub.port), timeout=10.0) as stranger:
        assert _is_hung_up_on(stranger, words)
    lines = [_line(hub, 0), _line(hub, 1)]
    assert hub.gather(10.0) == ()
    assert not any(line.ended.is_set() for line in lines)


def _is_hung_up_on(stranger: socket.socket, words: bytes) -> bool:
    try:
        stranger.sendall(words)
        return stranger.recv(1) == b""
    except (BrokenPipeError, ConnectionResetError):  # more than was read
        return True


@pytest.mark.parametrize("token", ['"\\ud800"', "5", "null"])
def test_a_token_that_is_none_is_refused(hub: Hub, token: str) -> None:
    with socket.create_connection(("127.0.0.1", hub.port), timeout=10.0) as stranger:
        stranger.sendall(f'{{"hello": {{"token": {token}, "rank": 1}}}}\n'.encode())
        assert b"it belongs to another run" in stranger.recv(1000)
    _line(hub, 0)
    _line(hub, 1)
    assert hub.gather(10.0) == ()


def test_nobody_answers_for_another_rank(hub: Hub) -> None:
    _answering(_line(hub, 0))
    forger = socket.create_connection(("127.0.0.1", hub.port), timeout=10.0)
    forger.sendall(b'{"hello": {"token": "ours", "rank": 1}}\n')
    assert hub.gather(10.0) == ()
    forger.sendall(b'{"number": 1, "rank": 0, "echo": "forged"}\n')
    assert _is_hung_up_on_at_last(forger)
    with pytest.raises(UnresponsiveError) as caught:
        hub.ask({0: {"do": "this"}}, timeout_s=10.0, during="a test")
    assert caught.value.ranks == (1,)


def _is_hung_up_on_at_last(stranger: socket.socket) -> bool:
    with contextlib.suppress(ConnectionResetError):  # a sign of life of its own was not read any more
        while stranger.recv(1000):  # signs of life
            pass
    return True


def test_who_says_nothing_is_hung_up_on(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    line = _line(hub, 0)
    _let_in(hub, 0)
    monkeypatch.setattr(control, "_NAMELESS_S", 0.1)
    with socket.create_connection(("127.0.0.1", hub.port), timeout=10.0) as stranger:
        assert stranger.recv(1) == b""
    assert not line.ended.is_set()


def test_a_rank_for_whom_no_file_is_left_is_not_called_missing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def accept(self) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        def fileno(self) -> int:
            return listener.fileno()

    listener = hub._listener
    hub._selector.unregister(listener)
    full: Any = Full()
    monkeypatch.setattr(hub, "_listener", full)
    hub._selector.register(full, selectors.EVENT_READ)
    with (
        socket.create_connection(listener.getsockname(), timeout=10.0),
        pytest.raises(
            FabricError, match=r"rank 0 may open no more files \(Too many open files\) with 0 of 2 ranks there"
        ),
    ):
        hub.gather(60.0)
    monkeypatch.undo()
