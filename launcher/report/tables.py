"""Rows of text for the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any

from cluster.fabric.findings import Finding
from cluster.fabric.report import units
from cluster.fabric.report.tables import KeyFigure, Table
from launcher.event_words import duration, event_words
from launcher.goodput import CATEGORIES, STARTING, Ledger
from launcher.goodput.account import Category
from launcher.jobs.inspection.status import RunStatus
from launcher.report.series import MetricSeries

MOST_EVENTS = 300
MOST_ROWS = 60
_UNTOLD = frozenset({"sample", "begin", "ranks_started"})

_COLOURS: dict[str, str] = {
    "steps": "good",
    "stragglers": "series-1",
    "data": "series-3",
    "saving": "series-2",
    "validation": "series-0",
    "lost": "bad",
    "restarts": "series-4",
    "starting": "series-5",
    "queued": "quiet",
    "stopped": "line",
    "finishing": "series-6",
    "other": "muted",
}


@dataclass(frozen=True, kw_only=True)
class Share:
    """One row of the goodput table, and one piece of its bar."""

    words: str
    time: str
    share: str
    percent: float
    colour: str
    """Name of a CSS variable."""
    parts: tuple[tuple[str, str], ...] = ()
    """Words and time."""


def span(seconds: float | None) -> str:
    """`12.3 s`, `3 h 20 min`; a dash where it is not known."""
    if seconds is None:
        return "–"
    return duration(seconds) if seconds >= 600 else units.seconds(seconds)


def summary(status: RunStatus, series: MetricSeries, ledger: Ledger | None) -> list[KeyFigure]:
    """The run in a few numbers."""
    total = "" if status.total_steps is None else f"of {status.total_steps:,}"
    figures = [KeyFigure(label="steps", value=f"{status.step:,}", unit=total)]
    if (loss := series.last("loss")) is not None:
        figures.append(KeyFigure(label="training loss", value=f"{loss:.4f}", unit="nats"))
    if (held_out := series.last("val_loss")) is not None:
        figures.append(KeyFigure(label="held-out loss", value=f"{held_out:.4f}", unit="nats"))
    if (bits := series.last("val_bits_per_byte")) is not None:
        figures.append(KeyFigure(label="held-out text", value=f"{bits:.4f}", unit="bits/byte"))
    if (tokens := series.usual("tokens_per_s")) is not None:
        figures.append(KeyFigure(label="throughput", value=f"{tokens:,.0f}", unit="tokens/s"))
    if (mfu := series.usual("mfu")) is not None:
        figures.append(KeyFigure(label="MFU", value=f"{100 * mfu:.1f}", unit="%"))
    if (memory := series.most("memory_bytes")) is not None:
        value, _, unit = units.size(memory).partition(" ")
        figures.append(KeyFigure(label="memory of the first rank", value=value, unit=unit))
    if ledger is not None and ledger.goodput is not None:
        figures.append(KeyFigure(label="goodput", value=f"{100 * ledger.goodput:.1f}", unit="%"))
        figures.append(KeyFigure(label="wall clock", value=span(ledger.whole_s), unit=""))
    # Over the whole run; the status counts those of its last job.
    restarts = status.restarts if ledger is None else max(0, len(ledger.starts) - 1)
    figures.append(KeyFigure(label="restarts", value=f"{restarts:,}", unit=""))
    return figures


def shares(ledger: Ledger | None) -> list[Share]:
    """Where the time went, without what took none; the parts of starting in one."""
    if ledger is None or ledger.end <= ledger.begin:
        return []
    whole = ledger.end - ledger.begin
    rows = []
    for category, words in CATEGORIES.items():
        if category == STARTING[0]:
            spent = sum(ledger.spent[part] for part in STARTING)
            parts = tuple(_part(part, ledger) for part in STARTING if ledger.spent[part])
            rows.append(_share("starting", "starting, up to the first step", spent, whole, parts))
        elif category not in STARTING:
            rows.append(_share(category, words, ledger.spent[category], whole))
    return [row for row in rows if row.percent > 0]


def _part(category: Category, ledger: Ledger) -> tuple[str, str]:
    return CATEGORIES[category].removeprefix("starting: "), span(ledger.spent[category] / 1e6)


def _share(category: str, words: str, spent: int, whole: int, parts: tuple[tuple[str, str], ...] = ()) -> Share:
    return Share(
        words=words,
        time=span(spent / 1e6),
        share=units.percent(spent / whole),
        percent=100 * spent / whole,
        colour=f"--{_COLOURS[category]}",
        parts=parts,
    )


def starts_table(ledger: Ledger | None) -> Table | None:
    """Every start, the last ones where there are many."""
    rows = []
    for start in (ledger.starts if ledger is not None else ())[-MOST_ROWS:]:
        steps = "–" if start.first_step is None else f"{start.first_step:,} to {start.last_step or start.first_step:,}"
        lasted = None if start.ended is None else start.ended - start.began
        rows.append(
            (
                str(start.number),
                moment(start.began),
                names(start.hosts),
                "–" if start.num_ranks is None else f"{start.num_ranks:,}",
                steps,
                span(None if start.trained is None else start.trained - start.began),
                "goes on" if start.ended is None else span(lasted),
                _line(start.ending) or "–",
            )
        )
    head = ("start", "began", "hosts", "ranks", "steps", "to first step", "lasted", "ended")
    return Table(head=head, rows=tuple(rows), numeric=frozenset({0, 3, 5, 6})) if rows else None


def failures_table(ledger: Ledger | None) -> Table | None:
    """Every failure, and what it has cost."""
    rows = tuple(
        (
            "–" if failure.attempt is None else str(failure.attempt),
            moment(failure.time),
            str(failure.kind).replace("_", " "),
            span(failure.detect_s),
            span(failure.train_again_s),
            f"{failure.lost_steps:,}",
            span(failure.lost_s) if failure.lost_steps else "–",
            _line(failure.message) or "–",
        )
        for failure in (ledger.failures if ledger is not None else ())[-MOST_ROWS:]
    )
    head = ("attempt", "when", "kind", "told after", "training after", "steps lost", "which took", "what")
    return Table(head=head, rows=rows, numeric=frozenset({0, 3, 4, 5, 6})) if rows else None


def preflight_table(events: Iterable[Mapping[str, Any]]) -> Table | None:
    """What was found before each attempt."""
    rows = tuple(
        (str(event.get("attempt", "–")), moment(event["time"]), _seconds(event.get("seconds")), event_words(event))
        for event in events
        if event["event"] == "preflight"
    )[-MOST_ROWS:]
    return Table(head=("attempt", "when", "took", "verdict"), rows=rows, numeric=frozenset({0, 2})) if rows else None


@dataclass(frozen=True, kw_only=True)
class EventsTable:
    """What has happened."""

    table: Table
    heading: str
    """How many rows there are, and whether these are all."""


def events_table(events: Sequence[Mapping[str, Any]]) -> EventsTable | None:
    """What has happened; the last of it where that is much. Checkpoints one after another are one row: of a healthy run there
    is little else."""
    told = [event for event in events if event["event"] not in _UNTOLD]
    groups = groupby(enumerate(told), key=lambda each: -1 if each[1]["event"] == "checkpoint" else each[0])
    all_rows = [_event_row([event for _, event in group]) for _, group in groups]
    rows = tuple(all_rows[-MOST_EVENTS:])
    if not rows:
        return None
    several = f"{len(rows)} rows" if len(rows) > 1 else "1 row"
    heading = several if len(rows) == len(all_rows) else f"The last {len(rows)} of {len(all_rows):,} rows"
    return EventsTable(
        table=Table(head=("when", "event", "what"), rows=rows, numeric=frozenset()),
        heading=heading,
    )


def _event_row(events: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    """Of one event, or of several checkpoints."""
    first, last = events[0], events[-1]
    if len(events) > 1:
        steps = f"of steps {first.get('step')} to {last.get('step')}, until {moment(last['time'])}"
        return moment(first["time"]), "checkpoints", f"{len(events):,} checkpoints {steps}"
    return moment(first["time"]), str(first["event"]).replace("_", " "), _line(event_words(first))


def verdict_of(findings: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The findings of the run's watch, as a diagnosis has them; damaged ones are left out."""
    sound = []
    for data in findings:
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            sound.append(Finding.from_data(data).as_data())
    return {"healthy": not sound, "findings": sound}


def moment(seconds: float) -> str:
    """`2026-11-23 10:41:12`, by the clock of where the page is made."""
    try:
        return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return "–"


def names(hosts: Sequence[str]) -> str:
    """A few by name."""
    shown = ", ".join(hosts[:4])
    return f"{shown} and {len(hosts) - 4} more" if len(hosts) > 4 else shown or "–"


def _seconds(value: Any) -> str:
    return span(value) if isinstance(value, int | float) else "–"


def _line(text: str, length: int = 200) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= length else f"{line[: length - 1]}…"
