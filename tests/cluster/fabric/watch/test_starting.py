"""A watcher that does not start: its own words are told, and where the rest stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import FabricError
from cluster.fabric.watch import starting
from cluster.fabric.watch.starting import WatcherSettings, start_watcher


def _settings(directory: Path) -> WatcherSettings:
    return WatcherSettings(
        directory=str(directory),
        host="here",
        world_size=2,
        hang_seconds=1.0,
        address="127.0.0.1",
        pid=1,
        start_ticks=1,
        rank=0,
    )


def test_a_watcher_that_ends_at_once_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = starting.log_file(tmp_path, "here")
    log.parent.mkdir()
    log.write_text("OSError: of an earlier start\n")
    program = "import sys; sys.stdin.read(); raise OSError(98, 'Address already in use')"
    monkeypatch.setattr(starting, "_PROGRAM", program)
    with pytest.raises(FabricError) as raised:
        start_watcher(_settings(tmp_path), None)
    words = "the watcher of here ended at its start: OSError: [Errno 98] Address already in use; see "
    assert str(raised.value) == words + str(log)
    monkeypatch.setattr(starting, "_PROGRAM", "")
    with pytest.raises(FabricError, match=r"here ended at its start: see "):
        start_watcher(_settings(tmp_path), None)


def test_a_watcher_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "_PROGRAM", "import time; time.sleep(600)")
    monkeypatch.setattr(starting, "_START_SECONDS", 0.1)
    with pytest.raises(FabricError, match=r"here did not start within 0.1 s: see "):
        start_watcher(_settings(tmp_path), None)
