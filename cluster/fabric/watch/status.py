"""What the watch of a run knows, read from the run's directory. Imports without torch."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import FabricError
from cluster.fabric.findings import Finding

FOLDER = "fabric"
STATE_FILE = "watch.json"
FINDINGS_FILE = "findings.jsonl"
_FRESH_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """One rank as the watch saw it last."""

    rank: int
    host: str
    state: str
    """starting, training, waiting, stopped, silent (its interpreter is held), unreachable, dead, ended."""
    quiet_s: float
    """Seconds since one of its collectives began or ended."""
    doing: str
    """The collective it waits in, or the line of code where it was; empty where that is not known."""


@dataclass(frozen=True, kw_only=True)
class RecordedFinding:
    """A finding with its time, in seconds since 1970."""

    time: float
    finding: Finding


@dataclass(frozen=True, kw_only=True)
class WatchStatus:
    """The state of a watched run."""

    updated: float
    """When the head last wrote, in seconds since 1970."""
    running: bool
    """Whether the head still writes: the run goes on."""
    ranks: tuple[RankStatus, ...]
    findings: tuple[RecordedFinding, ...]
    """All that were told in this directory, the oldest first."""

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "updated": self.updated,
            "running": self.running,
            "ranks": [vars(rank) for rank in self.ranks],
            "findings": [{"time": each.time, **each.finding.as_data()} for each in self.findings],
        }


def status(directory: Path, *, now: float | None = None) -> WatchStatus:
    """Reads what the watch of the run in `directory` wrote last; `now` is in seconds since 1970.

    Raises FabricError where the run has no watch.
    """
    path = directory / FOLDER / STATE_FILE
    if not path.exists():
        raise FabricError(
            f'{path} does not exist: no run in {directory} has been watched; runs are with fabric.monitor = "auto" or "on" '
            "and more than one rank"
        )
    state = json.loads(path.read_text())
    moment = time.time() if now is None else now
    return WatchStatus(
        updated=state["updated"],
        running=not state["ended"] and moment - state["updated"] < _FRESH_SECONDS,
        ranks=tuple(RankStatus(**rank) for rank in state["ranks"]),
        findings=tuple(sorted(_findings(directory / FOLDER), key=lambda finding: finding.time)),
    )


def lost_head_file(directory: Path, host: str) -> Path:
    """Where the watcher of a host says that it has lost the head."""
    return directory / FOLDER / f"watcher-{host.replace('/', '_')}.json"


def lost_head_files(directory: Path) -> list[Path]:
    """Those that are there."""
    return sorted((directory / FOLDER).glob("watcher-*.json"))


def _findings(folder: Path) -> Iterator[RecordedFinding]:
    for path in (folder / FINDINGS_FILE, *lost_head_files(folder.parent)):
        if not path.exists():
            continue
        with path.open() as file:
            for line in file:
                with contextlib.suppress(json.JSONDecodeError):  # a line that is being written
                    data = json.loads(line)
                    yield RecordedFinding(time=data["time"], finding=Finding.from_data(data))
