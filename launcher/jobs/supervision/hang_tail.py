"""What the watch of a run (`cluster.fabric.watch`) tells its supervisor: hangs, and where each rank is.

A finding alone ends nothing: it may be over when it is told. It is a hang when the run has made no step for a while after
it, and there still is a rank that has neither begun nor ended a collective since.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import FabricError
from cluster.fabric.findings import Finding, Kind
from cluster.fabric.watch.status import FINDINGS_FILE, FOLDER, RankStatus, WatchStatus, status
from launcher.jobs.supervision.progress import last_step
from megamodel.train.run_directory import RunDirectory

# Those that say that the run stands still. Stragglers and slow links only slow it down.
_STANDSTILL: frozenset[Kind] = frozenset({"missing_rank", "mismatched_collective", "transport_fault"})
# A rank that is missing because it works (a save, a validation, a compiler) may need so much longer; the watch waits for it
# by the same factor.
_WORKING_FACTOR = 8.0
# The watch of the attempt before outlives its ranks by a few seconds, and may have the last word on them.
_EARLIER_WATCH_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Hang:
    """The run stands still."""

    finding: Finding
    at: float
    """Seconds since 1970: when ranks began to wait for what did not come."""


class HangTail:
    """Follows the findings of one attempt; to be made before its ranks start, since what is there then is not of them."""

    def __init__(
        self, run: RunDirectory, *, patience_s: float, hang_seconds: float, clock: Callable[[], float] = time.time
    ) -> None:
        """`patience_s`: how long the run may stand still after a finding. `hang_seconds`: `fabric.hang_seconds` of the watch;
        `clock` gives seconds since 1970."""
        self._run = run
        self._patience_s = patience_s
        self._clock = clock
        self._path = run.root / FOLDER / FINDINGS_FILE
        self._since = clock()
        # Nothing can be missed for so long before it has begun.
        self._first_finding = self._since + min(hang_seconds, _EARLIER_WATCH_SECONDS)
        self._read_bytes = self._path.stat().st_size if self._path.exists() else 0
        self._pending: tuple[float, int | None, Hang] | None = None
        self.told: list[Finding] = []
        """All of this attempt that say that the run stands still, the oldest first."""

    def look(self) -> Hang | None:
        """The finding by which the run has been standing still for long enough; None while there is none. Reads files."""
        now = self._clock()
        for told, finding in self._new_findings():
            if finding.kind not in _STANDSTILL:
                continue
            self.told.append(finding)
            # The first tells more than what follows from it. That a rank is gone its agent tells too, and sooner; but one that
            # ended as if all were done (exit code 0) is no failure to it.
            if self._pending is None:
                hang = Hang(finding=finding, at=told - finding.evidence.get("waited_s", 0.0))
                self._pending = (now, self._last_step(), hang)
        if self._pending is None:
            return None
        told_at, step, hang = self._pending
        if self._last_step() != step:
            self._pending = None
        elif now - told_at >= self._patience_s * (
            _WORKING_FACTOR if hang.finding.evidence.get("state") == "working" else 1.0
        ):
            if not self._all_have_moved(now - told_at, now):
                return hang
            self._pending = None
        return None

    def _last_step(self) -> int | None:
        return last_step(self._run, since=self._since)

    def _all_have_moved(self, seconds: float, now: float) -> bool:
        """Whether each rank has begun or ended a collective within the last `seconds`. Not every step is recorded, and a
        validation or a save is none."""
        seen = _status_since(self._run.root, self._since)
        # What a watch said that is silent by now tells nothing of the time since.
        return seen is not None and all(rank.quiet_s + now - seen.updated < seconds for rank in seen.ranks)

    def _new_findings(self) -> list[tuple[float, Finding]]:
        """Each with when it was told, in seconds since 1970."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read_bytes)
                text = file.read()
        except OSError:
            return []
        whole = text.rpartition(b"\n")[0] + b"\n" if b"\n" in text else b""
        self._read_bytes += len(whole)
        found = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a killed watcher may leave half a line
                data = json.loads(line)
                if data["time"] >= self._first_finding:
                    found.append((data["time"], Finding.from_data(data)))
        return found


def watched_ranks(root: Path, *, since: float) -> dict[int, RankStatus]:
    """Each rank of the run in the folder `root` as its watch saw it last. Empty where there is no watch, or its words are
    older than `since`, in seconds since 1970, and so of an earlier start."""
    seen = _status_since(root, since)
    return {} if seen is None else {rank.rank: rank for rank in seen.ranks}


def _status_since(root: Path, since: float) -> WatchStatus | None:
    try:
        seen = status(root)
    except (FabricError, OSError, ValueError, KeyError, TypeError):
        return None
    return seen if seen.updated >= since else None
