"""The rank's side, against a watcher that is a socket of the test."""

from __future__ import annotations

import os
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import FabricError
from cluster.fabric.watch import flight, rank_side, stacks
from cluster.fabric.watch.protocol import (
    Meeting,
    local_socket,
    rank_name,
    receive_datagrams,
    send_datagram,
    watcher_name,
)
from cluster.fabric.watch.rank_side import Watch, start_watch
from cluster.fabric.watch.setup import WatchSetup

MEETING = Meeting(address="127.0.0.1", port=1, token=f"{os.getpid():032d}"[::-1], host="here")


def _setup(directory: Path, exchange: Callable[[str | None], str], **more: Any) -> WatchSetup:
    facts: dict[str, Any] = {"rank": 0, "world_size": 2, "local_rank": 0, "host": "here", "address": "127.0.0.1"}
    return WatchSetup(directory=directory, exchange=exchange, **{**facts, **more})


class _Watcher:
    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def hear(self, kind: str) -> dict[str, Any]:
        """The next word of a kind."""
        while True:
            assert select.select([self._socket], [], [], 20)[0], f"no {kind}"
            for message in receive_datagrams(self._socket, MEETING.token):
                if message["t"] == kind:
                    return message

    def ask(self) -> None:
        assert send_datagram(self._socket, rank_name(MEETING.token, 0), MEETING.token, {"t": "ask"})


@pytest.fixture
def watcher() -> Iterator[_Watcher]:
    with local_socket(watcher_name(MEETING.token, "here")) as sock:
        yield _Watcher(sock)


@pytest.fixture
def watch(tmp_path: Path, watcher: _Watcher) -> Iterator[Watch]:
    watch = Watch(_setup(tmp_path, lambda text: text or ""), MEETING)
    yield watch
    watch.close()


def test_what_a_rank_says(watch: Watch, watcher: _Watcher, tmp_path: Path) -> None:
    hello = watcher.hear("hello")
    assert (hello["rank"], hello["pid"]) == (0, os.getpid())
    assert hello["signal"] > 0
    watcher.hear("tick")
    assert watch.send("durations", {"step": 3})
    assert watcher.hear("say")["payload"] == {"step": 3}
    assert not watch.send("durations", {"long": "x" * 1_000_000})
    watcher.ask()
    assert "groups" in watcher.hear("calls")
    assert (tmp_path / "stacks" / "rank-0.txt").exists()
    watch.close()
    watch.close()
    assert watcher.hear("bye")["rank"] == 0
    assert not (tmp_path / "stacks").exists()


def test_a_quiet_rank_says_where_it_is(watch: Watch, watcher: _Watcher) -> None:
    while watcher.hear("tick")["quiet"] == 0:
        pass
    tick = watcher.hear("tick")
    assert tick["quiet"] > 0
    assert tick["place"]
    assert not tick["waits"]


def test_a_recorder_that_fails_makes_no_rank_silent_or_hung(
    watch: Watch, watcher: _Watcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("another format")

    monkeypatch.setattr(flight, "counters", fail)
    while not caplog.records:
        watcher.hear("tick")
    assert watcher.hear("tick")["quiet"] == 0
    assert watcher.hear("tick")["quiet"] == 0
    assert [record.getMessage() for record in caplog.records] == [
        "torch's flight recorder cannot be read: hangs of this rank will not be seen"
    ]


def test_calls_that_no_recorder_holds_make_no_rank_hung(
    watch: Watch, watcher: _Watcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rank_side, "_UNRECORDED_PERIODS", 0)
    monkeypatch.setattr(flight, "counters", lambda: None)
    while not caplog.records:
        watcher.hear("tick")
    assert [watcher.hear("tick")["quiet"] for _ in range(2)] == [0, 0]
    assert ["no collective on NCCL" in record.getMessage() for record in caplog.records] == [True]


def test_the_thread_of_a_rank_never_dies(
    watch: Watch, watcher: _Watcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("no frames")

    with monkeypatch.context() as broken:
        broken.setattr(rank_side, "main_thread_position", fail)
        broken.setattr(flight, "counters", tuple)
        while not caplog.records:
            assert watch._thread.is_alive()
            watch._thread.join(0.05)
    assert caplog.records[0].getMessage() == "the watch of this rank has failed and goes on"
    watcher.hear("tick")


def test_a_rank_that_nobody_hears_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rank_side, "_UNHEARD_SECONDS", 0.0)
    monkeypatch.setattr(rank_side, "_GREET_AGAIN_SECONDS", 0.01)
    ticks: list[object] = []
    monkeypatch.setattr(flight, "counters", lambda: ticks.append(None) or ())
    watch = Watch(_setup(tmp_path, lambda text: text or ""), MEETING)
    deadline = time.monotonic() + 20
    while len(ticks) < 5:
        assert time.monotonic() < deadline
        watch._thread.join(0.01)
    watch.close()
    (record,) = caplog.records
    assert "no watcher hears rank 0 on here" in record.getMessage()
    assert "watcher-here.log" in record.getMessage()


@pytest.fixture
def _many_files() -> Iterator[None]:
    """Any file that is opened from now on has a number beyond those that select knows."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 2048:
        pytest.skip("the limit of open files cannot be raised here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 2048), before[1]))
    opened: list[int] = []
    while not opened or opened[-1] < 1100:
        opened.append(os.open(os.devnull, os.O_RDONLY))
    yield
    for number in opened:
        os.close(number)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("_many_files")
def test_a_rank_with_many_files_has_its_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # It would close the file of an earlier test.
    monkeypatch.setattr(stacks, "StackFile", lambda *_: SimpleNamespace(signal=0, write=lambda: None))
    watch = start_watch(_setup(tmp_path, lambda text: text or "", world_size=1))
    assert watch._socket.fileno() > 1024
    (end,) = [thread for thread in threading.enumerate() if thread.name == "fabric-watcher-end"]
    watch.close()
    end.join(20)
    assert not end.is_alive()
    assert not caplog.records


@pytest.mark.parametrize("error", [FabricError, ValueError])
def test_a_watcher_that_does_not_start_is_told_to_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise error("no room")

    exchanged: list[str | None] = []

    def exchange(text: str | None) -> str:
        exchanged.append(text)
        return ""

    monkeypatch.setattr(rank_side, "start_watcher", fail)
    with pytest.raises(FabricError, match="rank 0's watcher did not start: no room"):
        start_watch(_setup(tmp_path, exchange))
    with pytest.raises(FabricError, match=r"did not start \(rank 0 says why\)"):
        start_watch(_setup(tmp_path, exchange, rank=1, local_rank=1))
    assert exchanged == ["", None]
