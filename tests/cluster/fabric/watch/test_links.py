"""Watchers and the head, over loopback in one process."""

from __future__ import annotations

import errno
import json
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.fabric.watch.head import Head
from cluster.fabric.watch.links import HeadLink, HeadServer, LocalHead
from cluster.fabric.watch.lost_head import LostHead
from cluster.fabric.watch.protocol import LineConnection, Meeting
from cluster.fabric.watch.records import Records
from cluster.fabric.watch.status import status

TOKEN = "c" * 32
ADDRESS = "127.0.0.1"


class _Network:
    def __init__(self, directory: Path) -> None:
        self.selector = selectors.DefaultSelector()
        self.server = HeadServer(ADDRESS, TOKEN)
        self.meeting = Meeting(address=ADDRESS, port=self.server.port, token=TOKEN, host="h0")
        head = Head(
            directory=directory,
            world_size=4,
            hang_seconds=8.0,
            analysers=[],
            ask=lambda: None,
            stacks=lambda: None,
            now=time.monotonic(),
        )
        self.head: LocalHead = self.server.serve(head, self.selector)

    def connect(self) -> LineConnection:
        return LineConnection(socket.create_connection((ADDRESS, self.server.port), timeout=10), TOKEN)

    def until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not happened():
            assert time.monotonic() < deadline
            for key, mask in self.selector.select(0.05):
                key.data(mask)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[_Network]:
    network = _Network(tmp_path)
    yield network
    network.head.close(time.monotonic())


@pytest.mark.parametrize(
    "message",
    [{}, {"t": "ranks"}, {"t": "calls", "rank": 99}, {"t": "calls", "rank": []}, {"t": "ranks", "ranks": 5, "host": 1}],
)
def test_words_that_the_head_does_not_understand_cost_their_sender_alone(
    network: _Network, message: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = network.connect(), network.connect()
    network.until(lambda: len(network.server._connections) == 2)
    bad.put(message)
    bad.flush()
    network.until(lambda: len(network.server._connections) == 1)
    assert "does not understand" in caplog.text
    network.server.tick()
    heard: list[Any] = []
    network.until(lambda: bool(heard.extend(good.messages()) or heard))
    assert heard == [{"t": "here"}]


def test_no_room_for_another_host_is_told_once_and_tried_again(
    network: _Network, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    listener = network.server._listener

    class _Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(listener, name)

        def accept(self) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as full:
        full.setattr(network.server, "_listener", _Full())
        network.connect()
        network.until(lambda: bool(caplog.records))
        assert network.selector.select(0) == []  # does not spin
        network.server.tick()
        network.until(lambda: network.server._is_full)
    (record,) = caplog.records
    assert "no room for another" in record.getMessage()
    network.server.tick()
    network.until(lambda: len(network.server._connections) == 1)


def test_a_head_that_falls_silent_is_missed_and_one_that_takes_its_leave_is_not(network: _Network) -> None:
    link = HeadLink(network.meeting, network.selector, lambda message: None)
    link.tick(time.monotonic())
    network.until(lambda: len(network.server._connections) == 1)
    later = time.monotonic() + 100
    assert link.silent_s(later) > 50
    before = link._heard
    network.server.tick()
    network.until(lambda: link._heard > before)
    assert link.silent_s(link._heard + 1) == pytest.approx(1)
    network.server.order({"t": "over"})
    network.until(lambda: link.silent_s(later) == 0)


def test_who_has_lost_the_head_says_so_and_takes_it_back(tmp_path: Path) -> None:
    meeting = Meeting(address="10.0.0.1", port=1, token=TOKEN, host="h0")
    records = Records(tmp_path)
    records.write_state([], ended=False)
    lost = LostHead(tmp_path, "h3", meeting)
    assert not lost.judge(3.0, 8.0)
    assert lost.judge(9.0, 8.0)
    assert not lost.judge(10.0, 8.0)
    (told,) = status(tmp_path).findings
    assert (told.finding.kind, told.finding.ranks, told.finding.hosts) == ("missing_rank", (0,), ("h0",))
    assert told.finding.sentence == ("rank 0 (h0) is out of reach: h3 has heard nothing of the watch there for 9 s.")
    assert json.loads((tmp_path / "fabric" / "watcher-h3.json").read_text())["evidence"]["told_by"] == "h3"
    assert not lost.judge(0.0, 8.0)
    assert status(tmp_path).findings == ()
    assert lost.judge(9.0, 8.0)
    Records(tmp_path)  # a later run in the same directory
    assert status(tmp_path).findings == ()
