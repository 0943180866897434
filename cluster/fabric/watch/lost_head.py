"""What a host's watcher leaves in the run's directory when the head, on rank 0's host, can no longer be heard."""

from __future__ import annotations

import time
from pathlib import Path

from cluster.fabric.findings import Finding
from cluster.fabric.watch.protocol import Meeting
from cluster.fabric.watch.records import replace_json
from cluster.fabric.watch.status import lost_head_file

_CONFIDENCE = 0.7
"""One host alone cannot tell whether the other one or its own network is gone."""


class LostHead:
    """Says once that the head is lost, and takes it back when the head is there again."""

    def __init__(self, directory: Path, host: str, meeting: Meeting) -> None:
        self._path = lost_head_file(directory, host)
        self._host = host
        self._meeting = meeting
        self._is_told = False

    def judge(self, silent_s: float, patience_s: float) -> bool:
        """Whether this is news: nothing was heard of the head for `silent_s`, more than `patience_s`."""
        is_lost = silent_s > patience_s
        if is_lost == self._is_told:
            return False
        if is_lost:
            replace_json(self._path, {"time": time.time(), **self._finding(silent_s).as_data()})
        else:
            self._path.unlink(missing_ok=True)
        self._is_told = is_lost
        return is_lost

    def _finding(self, silent_s: float) -> Finding:
        return Finding(
            kind="missing_rank",
            hosts=(self._meeting.host,),
            ranks=(0,),
            confidence=_CONFIDENCE,
            evidence={
                "state": "unreachable",
                "silent_s": round(silent_s, 1),
                "told_by": self._host,
                "address": self._meeting.address,
            },
            sentence=(
                f"rank 0 ({self._meeting.host}) is out of reach: {self._host} has heard nothing of the watch there for "
                f"{silent_s:.0f} s."
            ),
        )
