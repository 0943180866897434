"""What a run's folder tells of it, read while others write there. Nothing here raises for a torn or damaged file."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, TypeVar, get_args

from launcher.failure_record import FailureRecord, read_failure
from launcher.jobs.job_record import JobFolder, JobRecord, JobState, SupervisorState
from launcher.run_lock import is_held
from megamodel.train.run_directory import RunDirectory

_LINES = 40
"""Of the end of metrics.jsonl: enough for a speed that does not jump."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The last step of a run, and how fast it goes."""

    step: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    step_s: float | None = None
    """Seconds from one step to the next, with all that comes between."""
    time: float | None = None
    """Of the last record, in seconds since 1970."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """One look into a run's folder."""

    run: RunDirectory
    record: JobRecord | None
    state: SupervisorState | None
    excluded_hosts: Mapping[str, str]
    """Hosts that the job does not use, with the reason; of SLURM those of earlier jobs of the run too."""
    heard: float | None
    """When the supervisor gave word of itself last, in seconds since 1970."""
    events: tuple[Mapping[str, Any], ...]
    is_held: bool | None
    """Whether a process holds the run; None where this file system cannot tell."""
    pace: Pace
    total_steps: int | None

    def last(self, *names: str) -> Mapping[str, Any] | None:
        """The last event of one of these names."""
        return next((event for event in reversed(self.events) if event["event"] in names), None)

    @property
    def started(self) -> float | None:
        """When training was started last, in seconds since 1970."""
        last = self.last("begin", "start", "resume")
        return None if last is None else last["time"]

    @property
    def num_starts(self) -> int:
        """How often training was."""
        return sum(event["event"] in ("start", "resume") for event in self.events)

    @property
    def attempt(self) -> int:
        """Number of the newest attempt that has logs; else how often training was started."""
        return max(attempt_numbers(self.run), default=self.num_starts)


def look_at(run: RunDirectory) -> RunFacts:
    """Reads little of large files: of the metrics their end."""
    folder = JobFolder(run, say=lambda text: None)  # who only looks, perhaps every second, has nothing to mend
    state = _undamaged(lambda: _sound(folder.read_state()))
    events = _undamaged(lambda: tuple(_whole_events(run))) or ()
    return RunFacts(
        run=run,
        record=_undamaged(folder.read_record),
        state=state,
        excluded_hosts=_undamaged(lambda: _excluded_hosts(folder)) or {},
        heard=None if state is None else max(state.updated, _modified(folder.root / "state.json")),
        events=events,
        is_held=is_held(run.root),
        pace=_undamaged(lambda: _pace(run, events)) or Pace(),
        total_steps=_total_steps(run, folder),
    )


def attempt_numbers(run: RunDirectory) -> list[int]:
    """Of the attempts that have a folder in logs/, ascending."""
    names = (path.name.removeprefix("attempt-") for path in run.logs.glob("attempt-*"))
    return sorted(int(name) for name in names if name.isdecimal())


def first_failure_record(facts: RunFacts) -> tuple[int, FailureRecord] | None:
    """Of the last start of `mega train --ranks`: the rank that failed first, and its account; None where none left one."""
    found = []
    for path in (facts.run.logs / f"attempt-{facts.attempt}").glob("rank-*.failure.json"):
        record = _undamaged(lambda path=path: read_failure(path))  # type: ignore[misc]
        rank = path.name.removeprefix("rank-").removesuffix(".failure.json")
        if record is not None and rank.isdecimal() and record.at >= (facts.started or 0.0):
            found.append((int(rank), record))
    return min(found, key=lambda each: (each[1].lost_a_peer, each[1].at), default=None)


def _undamaged(read: Callable[[], T | None]) -> T | None:
    """What is read; None where the file is damaged, or of another version of this."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        return read()
    return None


def _sound(state: SupervisorState | None) -> SupervisorState | None:
    """Raises ValueError for one whose values cannot be."""
    if state is None:
        return None
    numbers = (state.updated, state.attempt, state.restarts)
    if (
        state.state not in get_args(JobState)
        or None in map(_number, numbers)
        or not isinstance(state.excluded_hosts, dict)
    ):
        raise ValueError("damaged")
    return state


def _excluded_hosts(folder: JobFolder) -> dict[str, str]:
    record, state = folder.read_record(), _sound(folder.read_state())
    if record is not None and record.backend == "slurm":
        return folder.excluded_hosts()
    return {} if state is None else state.excluded_hosts


def _whole_events(run: RunDirectory) -> list[Mapping[str, Any]]:
    return [
        event
        for event in run.read_events()
        if isinstance(event.get("event"), str) and _number(event.get("time")) is not None
    ]


def _pace(run: RunDirectory, events: tuple[Mapping[str, Any], ...]) -> Pace:
    lines = [
        line for line in islice(run.newest_metrics(), _LINES) if "loss" in line and isinstance(line.get("step"), int)
    ]
    if not lines:
        return Pace()
    last = lines[0]
    # Steps of earlier starts tell nothing of the pace of this one, nor does its first step, which may compile.
    begun = max((event["time"] for event in events if event["event"] in ("start", "resume")), default=0.0)
    timed = [line for line in lines if (_number(line.get("time")) or 0.0) > begun]
    speeds = [speed for line in timed[:-1] if (speed := _number(line.get("tokens_per_s"))) is not None]
    span = timed[0]["time"] - timed[-1]["time"] if len(timed) > 2 else None
    return Pace(
        step=last["step"],
        loss=_number(last.get("loss")),
        tokens_per_s=median(speeds) if speeds else _number(last.get("tokens_per_s")),
        mfu=_number(last.get("mfu")),
        step_s=span / max(1, last["step"] - timed[-1]["step"]) if span is not None else None,
        time=_number(last.get("time")),
    )


def _total_steps(run: RunDirectory, folder: JobFolder) -> int | None:
    # What was submitted last, or what was trained with last, whichever came later.
    for path in sorted((folder.config, run.config), key=_modified, reverse=True):
        found = _undamaged(lambda path=path: tomllib.loads(path.read_text(encoding="utf-8"))["train"]["steps"])  # type: ignore[misc]
        if isinstance(found, int):
            return found
    return None


def _modified(path: Path) -> float:
    """When a file was written last; 0 where it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < 1e308 else None
