"""The ledger of a run, from what it has left on disk."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.fabric.watch.status import FOLDER
from launcher.goodput.account import CATEGORIES, STARTING, Category, microseconds
from launcher.goodput.starts import Failure, Start
from launcher.goodput.stragglers import CostOfStep, straggler_costs
from launcher.goodput.timeline import Record, Timeline
from megamodel.train.json_lines import read_lines
from megamodel.train.run_directory import RunDirectory

WINDOWS_FILE = "windows.jsonl"
# Where two records have the same time: what was lost ends before, and begins after, all else.
_LOST_ENDS, _EVENT, _METRICS, _LOST_BEGINS = range(4)

_Mark = tuple[int, int, Record]
"""Microseconds since 1970, which kind of record it is, the record."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Where the time has gone."""

    begin: int
    """Microseconds since 1970: the launch, or where nobody launched it, the first start."""
    end: int
    spent: Mapping[Category, int]
    """Microseconds; together they are `end - begin` exactly."""
    starts: tuple[Start, ...]
    failures: tuple[Failure, ...]

    @property
    def whole_s(self) -> float:
        """Seconds from begin to end."""
        return (self.end - self.begin) / 1e6

    @property
    def goodput(self) -> float | None:
        """Share of the time that was spent on steps that count; None where no time has passed."""
        return self.spent["steps"] / (self.end - self.begin) if self.end > self.begin else None

    @property
    def starting_s(self) -> float:
        """Seconds in starts, up to the first step and with what that took longer than others."""
        return sum(self.spent[category] for category in STARTING) / 1e6

    def as_data(self) -> dict[str, Any]:
        """For JSON; times in seconds, those of begin and end since 1970."""
        return {
            "begin": self.begin / 1e6,
            "end": self.end / 1e6,
            "whole_s": self.whole_s,
            "goodput": self.goodput,
            "seconds": {category: self.spent[category] / 1e6 for category in CATEGORIES},
            "starting_s": self.starting_s,
            "starts": [start.as_data() for start in self.starts],
            "failures": [failure.as_data() for failure in self.failures],
        }


def read_ledger(
    run: RunDirectory,
    *,
    now: float | None,
    submitted: float | None = None,
    metrics: Iterable[Record] | None = None,
) -> Ledger | None:
    """The ledger of a run; None where it has left nothing to tell from. Damaged lines are passed over.

    now: in seconds since 1970, where the run still goes on; None ends it with its last record. submitted: when its last job
    was. metrics: the lines of its metrics.jsonl, where the caller reads them anyway.
    """
    events = list(run.read_events())
    if submitted is not None:
        events.append({"time": submitted, "event": "submitted"})
    return ledger_of(
        events,
        run.read_metrics() if metrics is None else metrics,
        windows=read_lines(windows_file(run.root)),
        now=now,
    )


def windows_file(root: Path) -> Path:
    """What the fabric monitor writes of the run in the folder `root`."""
    return root / FOLDER / WINDOWS_FILE


def ledger_of(
    events: Iterable[Record], metrics: Iterable[Record], *, windows: Iterable[Record] = (), now: float | None
) -> Ledger | None:
    """The same from the records themselves: `events` in any order, `metrics` and `windows` in that of their files."""
    told = [event for event in events if microseconds(event.get("time"))]
    marks = heapq.merge(sorted(_event_marks(told), key=_order), _metric_marks(metrics), key=_order)
    timeline: Timeline | None = None
    for at, kind, record in marks:
        if timeline is None:
            timeline = Timeline(_begin(at, record), cost_of_step=CostOfStep(straggler_costs(windows)))
        if kind == _EVENT:
            timeline.on_event(at, record)
        elif kind == _METRICS:
            timeline.on_metrics(at, record)
        else:
            timeline.on_lost(at, 1 if kind == _LOST_BEGINS else -1)
    if timeline is None:
        return None
    timeline.close(None if now is None else microseconds(now))
    return Ledger(
        begin=timeline.account.begin,
        end=timeline.account.now,
        spent=timeline.account.spent,
        starts=tuple(timeline.history.starts),
        failures=tuple(timeline.history.failures),
    )


def _order(mark: _Mark) -> tuple[int, int]:
    return mark[0], mark[1]


def _begin(at: int, record: Record) -> int:
    """Of the run, by its first record, which may tell of a time before it."""
    before = microseconds(record.get("began")) or microseconds(record.get("submitted"))
    return min(at, before or at - microseconds(record.get("step_time_s")))


def _event_marks(events: Iterable[Record]) -> Iterator[_Mark]:
    for event in events:
        yield microseconds(event["time"]), _EVENT, event
        since, until = microseconds(event.get("since")), microseconds(event.get("until"))
        if event.get("event") == "rollback" and 0 < since < until:
            yield since, _LOST_BEGINS, event
            yield until, _LOST_ENDS, event


def _metric_marks(metrics: Iterable[Record]) -> Iterator[_Mark]:
    """In the order of the file, which is that of steps: where a clock was set back, time stands still."""
    last = 0
    for line in metrics:
        at = microseconds(line.get("time"))
        if at and isinstance(line.get("step"), int):
            last = max(at, last)
            yield last, _METRICS, line
