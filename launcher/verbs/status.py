"""`mega status`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.errors import ConfigError
from launcher.output import Output

if TYPE_CHECKING:
    from rich.console import RenderableType

    from launcher.jobs.inspection.status import RunStatus

Runs = Annotated[
    list[Path] | None, typer.Argument(metavar="[RUN...]", help="Folders of runs, or their names. Default: all runs.")
]
Directory = Annotated[Path, typer.Option("--directory", help="Folder that holds the folders of runs.")]
Watch = Annotated[bool, typer.Option("--watch", help="Go on, and show it anew again and again; Ctrl-C ends it.")]
Refresh = Annotated[
    float | None, typer.Option("--refresh", min=0.2, metavar="S", help="With --watch: seconds between two looks (2).")
]

_REFRESH_SECONDS = 2.0
_COLUMNS = ("run", "state", "step", "loss", "tokens/s", "MFU", "ETA", "restarts", "last event")
_STYLES = {"running": "green", "finished": "green", "queued": "yellow", "restarting": "yellow", "failed": "red"}


def status(
    out: Output,
    runs: Runs = None,
    directory: Directory = Path("runs"),
    watch: Watch = False,
    refresh: Refresh = None,
) -> int:
    """Say how runs are: waiting, training, restarting or over, how far and how fast, and why what failed has failed."""
    look = _look(runs or [], directory)
    if watch or refresh is not None:
        if out.as_json:
            raise ConfigError("--json answers once, and --watch goes on: leave one of them out")
        _go_on(out, look, refresh or _REFRESH_SECONDS)
        return 0
    seen = look()
    if len(runs or []) == 1:
        _say_one(out, seen[0])
        out.result(seen[0].as_data())
        return 0
    _say_all(out, seen, directory)
    out.result({"runs": [each.as_data() for each in seen]})
    return 0


def _look(names: Sequence[Path], directory: Path) -> Callable[[], list[RunStatus]]:
    from launcher.jobs.inspection.status import run_statuses
    from launcher.run_record import find_run, runs_below

    for name in names:
        find_run(name, below=directory, launched=True)  # says at once which one there is not

    def look() -> list[RunStatus]:
        if names:
            return run_statuses([find_run(name, below=directory, launched=True) for name in names])
        return run_statuses(runs_below(directory, launched=True))

    return look


def _go_on(out: Output, look: Callable[[], list[RunStatus]], seconds: float) -> None:
    """Until Ctrl-C."""
    try:
        if not out.people.isatty():
            while True:
                _say_all(out, look(), None)
                time.sleep(seconds)
        from rich.console import Console
        from rich.live import Live

        with Live(_drawn(look()), console=Console(file=out.people), auto_refresh=False) as live:
            while True:
                time.sleep(seconds)
                live.update(_drawn(look()), refresh=True)
    except KeyboardInterrupt:
        return


def _say_all(out: Output, seen: Sequence[RunStatus], directory: Path | None) -> None:
    if not seen and directory is not None:
        out.say(f"There are no runs in {directory}: `mega train` or `mega launch` makes one.")
        return
    out.table(_COLUMNS, [_row(each) for each in seen])
    for line in _causes(seen):
        out.say(line)


def _say_one(out: Output, seen: RunStatus) -> None:
    from launcher.event_words import duration

    row = dict(zip(_COLUMNS, _row(seen, short=False), strict=True))
    row |= {
        "run": seen.directory,
        "attempt": str(seen.attempt),
        "hosts": ", ".join(seen.hosts),
        "excluded": ", ".join(f"{host} ({reason})" for host, reason in seen.excluded_because.items()),
        "job": " ".join(filter(None, [seen.backend, seen.job_id])),
        "waits for": seen.queue_reason or "",
        "cause": seen.cause or "",
    }
    if seen.eta_s is not None:
        row["ETA"] = duration(seen.eta_s)
    out.table(("what", "value"), [(what, value) for what, value in row.items() if value not in ("", "–")])


def _drawn(seen: Sequence[RunStatus]) -> RenderableType:
    """The same as `_say_all`, for a terminal whose picture is drawn anew."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(*_COLUMNS)
    for each in seen:
        cells = [Text(cell) for cell in _row(each)]
        cells[1].stylize(_STYLES[each.state])
        table.add_row(*cells)
    return Group(table, *map(Text, _causes(seen)))


def _row(seen: RunStatus, *, short: bool = True) -> tuple[str, ...]:
    """`short`: one of many rows, in which an event has little room."""
    from launcher.event_words import duration

    total = "" if seen.total_steps is None else f"/{seen.total_steps:,}"
    if seen.total_steps is not None and seen.step > seen.total_steps:  # fewer are asked for than it has made
        total = f" (of {seen.total_steps:,})"
    age = "" if seen.last_event_age_s is None else f", {duration(seen.last_event_age_s)} ago"
    return (
        seen.name,
        seen.state,
        f"{seen.step:,}{total}",
        "–" if seen.loss is None else f"{seen.loss:.4f}",
        "–" if seen.tokens_per_s is None else f"{seen.tokens_per_s:,.0f}",
        "–" if seen.mfu is None else f"{seen.mfu:.1%}",
        "–" if seen.eta_s is None else duration(seen.eta_s),
        str(seen.restarts),
        "–" if seen.last_event is None else f"{_short(seen.last_event) if short else seen.last_event}{age}",
    )


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _causes(seen: Sequence[RunStatus]) -> list[str]:
    """A line for each run that has failed, waits, or was started again."""
    lines = [
        f"{each.name}: {each.cause}"
        for each in seen
        if each.cause is not None and each.state in ("failed", "restarting")
    ]
    lines += [f"{each.name} waits in the queue: {each.queue_reason}" for each in seen if each.queue_reason]
    return [" ".join(line.split()) for line in lines]
