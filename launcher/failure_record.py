"""What a failing rank leaves behind for the process that started it: a small JSON file beside its log."""

from __future__ import annotations

import json
import os
import re
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

# What a rank says when another one is gone: an effect, never the first cause while any other explanation is there.
_LOST_PEER = re.compile(
    r"lost the others|could not meet the others|connection (closed|reset|refused)|broken pipe|"
    r"(gloo|nccl|store).*(timed? ?out|error)|timed out waiting",
    re.IGNORECASE | re.DOTALL,
)


def tells_of_lost_peer(message: str) -> bool:
    """Whether these are the words of a rank that only misses another one."""
    return _LOST_PEER.search(message) is not None


@dataclass(frozen=True, kw_only=True)
class FailureRecord:
    """The exception that ended a rank."""

    at: float
    """Seconds since the epoch."""
    message: str
    """One line, ready for the user."""
    exit_code: int
    traceback: str
    """The full traceback; empty for a user's mistake, which its message explains."""

    @property
    def lost_a_peer(self) -> bool:
        """Whether the rank only tells that another one is gone."""
        return tells_of_lost_peer(self.message)


def record_failure(path: Path, error: BaseException, *, message: str, exit_code: int, with_traceback: bool) -> None:
    """Writes the record of `error` to `path`, whole or not at all."""
    lines = traceback.format_exception(error) if with_traceback else []
    record = FailureRecord(at=time.time(), message=message, exit_code=exit_code, traceback="".join(lines))
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(record)), encoding="utf-8")
    os.replace(partial, path)


def read_failure(path: Path) -> FailureRecord | None:
    """The record at `path`, or None where the rank left none (it was killed, or ended on its own terms)."""
    try:
        return FailureRecord(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
