"""Where a run keeps what; the records that are appended to as it goes. Imports without torch."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamodel.train.json_lines import append_line, read_backwards, read_lines


@dataclass(frozen=True, kw_only=True)
class LostSteps:
    """Steps that a run had made beyond the checkpoint that it continues from; they are made again."""

    from_step: int
    """The last of them."""
    to_step: int
    """Of the checkpoint; 0 without one."""
    lost_steps: int
    lost_seconds: float
    """That they took, with the saving and validation between them."""
    since: float | None
    """When the first of them began, in seconds since 1970; None where the records do not tell."""
    until: float | None
    """When the last record of them was written."""


class RunDirectory:
    """`runs/<name>/`: one run's configuration, metrics, events, checkpoints, logs and exports."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.toml"
        self.tokenizer = root / "tokenizer.json"
        self.metrics = root / "metrics.jsonl"
        self.events = root / "events.jsonl"
        self.tensorboard = root / "tensorboard"
        self.checkpoints = root / "checkpoints"
        self.logs = root / "logs"
        self.export = root / "export"

    def keep_tokenizer(self, source: Path) -> None:
        """Copies the tokenizer here, so that the run can be sampled and exported wherever it is moved."""
        self.root.mkdir(parents=True, exist_ok=True)
        partial = self.tokenizer.with_suffix(".json.partial")
        shutil.copyfile(source, partial)
        os.replace(partial, self.tokenizer)

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """Complete lines of metrics.jsonl, in order; none where there is no file yet."""
        yield from read_lines(self.metrics)

    def newest_metrics(self) -> Iterator[dict[str, Any]]:
        """The same, the last line first: reads no more of a large file than is asked for."""
        yield from (line for line, _ in read_backwards(self.metrics))

    def read_events(self) -> Iterator[dict[str, Any]]:
        """Complete lines of events.jsonl, in order; none where there is no file yet."""
        yield from read_lines(self.events)

    def forget_metrics_after(self, step: int) -> LostSteps | None:
        """Drops what a run recorded beyond the checkpoint that it continues from, so that each step stands there once.

        Returns what was dropped; None where no step was.
        """
        if not self.metrics.exists():
            return None
        lost: list[dict[str, Any]] = []
        end = 0
        for line, its_end in read_backwards(self.metrics):  # in the order of steps
            if line.get("step", math.inf) <= step:
                end = its_end
                break
            lost.append({key: line[key] for key in line.keys() & _TOLD_OF_LOST})
        os.truncate(self.metrics, end)
        return _lost_steps(lost[::-1], to_step=step)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """One JSON object a line, with the time in seconds since 1970; a reader sees whole lines only."""
        append_line(self.metrics, {"time": time.time(), **record})

    def append_event(self, event: str, **details: Any) -> None:
        """What happened to the run (start, resume, checkpoint, skip, stop, end), with the time in seconds since 1970."""
        append_line(self.events, {"time": time.time(), "event": event, **details})


_DURATIONS = ("step_time_s", "save_s", "validation_s")
_TOLD_OF_LOST = {"step", "loss", "time", *_DURATIONS}


def seconds_of(line: dict[str, Any]) -> float:
    """How long what a line of metrics.jsonl tells of has taken."""
    return sum(line.get(name) or 0.0 for name in _DURATIONS)


def _lost_steps(lines: list[dict[str, Any]], *, to_step: int) -> LostSteps | None:
    """Of lines in order."""
    steps = [line for line in lines if "loss" in line]
    if not steps:
        return None
    first, last = lines[0].get("time"), lines[-1].get("time")
    return LostSteps(
        from_step=steps[-1]["step"],
        to_step=to_step,
        lost_steps=len(steps),
        lost_seconds=sum(map(seconds_of, lines)),
        since=None if first is None else first - seconds_of(lines[0]),
        until=last,
    )
