"""What the head leaves in the run's directory: events, findings, and the state of every rank."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.fabric.findings import Finding
from cluster.fabric.watch.status import FINDINGS_FILE, FOLDER, STATE_FILE, RankStatus


class Records:
    """Writes below a run's directory. A full disk is told on the watcher's log, and ends nothing."""

    def __init__(self, directory: Path) -> None:
        self._events = directory / "events.jsonl"
        self._findings = directory / FOLDER / FINDINGS_FILE
        self._state = directory / FOLDER / STATE_FILE
        self._findings.parent.mkdir(parents=True, exist_ok=True)

    def append_event(self, event: str, details: Mapping[str, Any]) -> None:
        """A line of events.jsonl as the trainer writes them: the time in seconds since 1970, the event, its details."""
        _append_line(self._events, {"time": time.time(), "event": event, **details})

    def append_finding(self, finding: Finding) -> None:
        """Into findings.jsonl, and as an event."""
        _append_line(self._findings, {"time": time.time(), **finding.as_data()})
        self.append_event("fabric_finding", finding.as_data())

    def write_state(self, ranks: Sequence[RankStatus], *, ended: bool) -> None:
        """All at once: a reader finds the old state or the new one."""
        data = {"updated": time.time(), "ended": ended, "ranks": [vars(rank) for rank in ranks]}
        partial = self._state.with_suffix(".json.partial")
        partial.write_text(json.dumps(data))
        os.replace(partial, self._state)


def _append_line(path: Path, record: Mapping[str, Any]) -> None:
    """In one write, so that lines of several processes never mix; half a line of a killed one is ended first."""
    with path.open("ab+") as file:
        glue = b""
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            glue = b"\n"
        file.write(glue + json.dumps(record).encode() + b"\n")
