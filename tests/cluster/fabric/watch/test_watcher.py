"""The loop of a watcher, within the test's process; its rank is a process that is there or has never been."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.fabric.watch import watcher as module
from cluster.fabric.watch.head import Head
from cluster.fabric.watch.links import HeadServer
from cluster.fabric.watch.processes import ProcessId, this_process
from cluster.fabric.watch.protocol import Meeting, local_socket, send_datagram, watcher_name
from cluster.fabric.watch.starting import WatcherSettings
from cluster.fabric.watch.status import status
from cluster.fabric.watch.watcher import Watcher

ADDRESS = "127.0.0.1"
NOBODY = ProcessId(pid=2**22 + 1, start_ticks=0)
"""Beyond the greatest number that Linux gives."""


def _settings(directory: Path, process: ProcessId, *, hang_seconds: float = 8.0) -> WatcherSettings:
    return WatcherSettings(
        directory=str(directory),
        host="h1",
        world_size=2,
        hang_seconds=hang_seconds,
        address=ADDRESS,
        pid=process.pid,
        start_ticks=process.start_ticks,
        rank=1,
    )


def _meeting(port: int) -> Meeting:
    return Meeting(address=ADDRESS, port=port, token=os.urandom(16).hex(), host="h0")


def test_a_watcher_whose_head_fails_goes_on_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("no such rank")

    monkeypatch.setattr(module, "_LINGER_SECONDS", 0.2)
    monkeypatch.setattr(module, "_TICK_SECONDS", 0.01)
    monkeypatch.setattr("cluster.fabric.watch.links._TICK_SECONDS", 0.0)
    monkeypatch.setattr(Head, "tick", fail)
    meeting = _meeting(0)
    Watcher(_settings(tmp_path, NOBODY), meeting, HeadServer(ADDRESS, meeting.token)).run()
    told = [record.getMessage() for record in caplog.records]
    assert told
    assert set(told) == {"the watcher of h1 has failed and goes on"}
    assert len(told) <= 2  # in the loop, and at its end


def test_a_watcher_without_its_head_says_so_itself(tmp_path: Path) -> None:
    with HeadServer(ADDRESS, "x")._listener as free:
        meeting = _meeting(free.getsockname()[1])
    (tmp_path / "fabric").mkdir()
    (tmp_path / "fabric" / "watch.json").write_text('{"updated": 0, "ended": false, "ranks": []}')
    watcher = Watcher(_settings(tmp_path, this_process(), hang_seconds=0.1), meeting, None)
    loop = threading.Thread(target=watcher.run, daemon=True)
    loop.start()
    _until(lambda: status(tmp_path).findings != ())
    name = watcher_name(meeting.token, "h1")
    with local_socket(f"\0mega-test-{os.getpid()}-rank") as rank:
        for message in ({"t": "nonsense"}, {"rank": 1}, {"t": "bye", "rank": 1}):  # the first two end nothing
            assert send_datagram(rank, name, meeting.token, message)
    loop.join(20)
    assert not loop.is_alive()
    (told,) = status(tmp_path).findings
    assert (told.finding.kind, told.finding.hosts, told.finding.ranks) == ("missing_rank", ("h0",), (0,))


def test_the_head_may_have_as_many_files_as_the_machine_allows() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[0] - 1, before[1]))
    try:
        module._allow_many_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)
