"""What the head leaves in the run's directory: events, findings, and the state of every rank."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.fabric.findings import Finding
from cluster.fabric.watch.status import FINDINGS_FILE, FOLDER, STATE_FILE, RankStatus, lost_head_files

_logger = logging.getLogger(__name__)
_KEPT_LINES = 1_000
"""That could not be written: the oldest go first."""


class Records:
    """Writes below a run's directory. A disk that takes nothing is told on the watcher's log, and ends nothing: lines wait
    until they can be written."""

    def __init__(self, directory: Path) -> None:
        self._events = directory / "events.jsonl"
        self._findings = directory / FOLDER / FINDINGS_FILE
        self._state = directory / FOLDER / STATE_FILE
        self._findings.parent.mkdir(parents=True, exist_ok=True)
        for path in lost_head_files(directory):  # of an earlier run
            path.unlink(missing_ok=True)
        self._unwritten: deque[tuple[Path, dict[str, Any]]] = deque(maxlen=_KEPT_LINES)
        self._has_failed = False

    def append_event(self, event: str, details: Mapping[str, Any]) -> None:
        """A line of events.jsonl as the trainer writes them: the time in seconds since 1970, the event, its details."""
        self._append(self._events, {"time": time.time(), "event": event, **details})

    def append_finding(self, finding: Finding) -> None:
        """Into findings.jsonl, and as an event."""
        self._append(self._findings, {"time": time.time(), **finding.as_data()})
        self.append_event("fabric_finding", finding.as_data())

    def write_state(self, ranks: Sequence[RankStatus], *, ended: bool) -> None:
        """All at once: a reader finds the old state or the new one."""
        data = {"updated": time.time(), "ended": ended, "ranks": [vars(rank) for rank in ranks]}
        try:
            replace_json(self._state, data)
        except OSError as error:
            self._complain(error)
        self._write_lines()

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        self._unwritten.append((path, record))
        self._write_lines()

    def _write_lines(self) -> None:
        try:
            while self._unwritten:
                _append_line(*self._unwritten[0])
                self._unwritten.popleft()
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._has_failed:
            self._has_failed = True
            _logger.warning("the watch cannot write (it tries again, and says so once): %s", error)


def replace_json(path: Path, data: Mapping[str, Any]) -> None:
    """All at once: a reader finds the old text or the new one."""
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(data))
    os.replace(partial, path)


def _append_line(path: Path, record: Mapping[str, Any]) -> None:
    """In one write, so that lines of several processes never mix; half a line of a killed one is ended first."""
    with path.open("ab+") as file:
        glue = b""
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            glue = b"\n"
        file.write(glue + json.dumps(record).encode() + b"\n")
