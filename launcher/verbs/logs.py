"""`mega logs`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.errors import ConfigError, RunError
from launcher.output import Output
from launcher.rank_process import EXIT_INTERRUPTED
from launcher.verbs.generate import Run

if TYPE_CHECKING:
    from launcher.jobs.inspection.log_reading import Log
    from megamodel.train.run_directory import RunDirectory

Rank = Annotated[int | None, typer.Option("--rank", min=0, metavar="N", help="What this rank said, and it alone.")]
Attempt = Annotated[
    int | None, typer.Option("--attempt", min=1, metavar="K", help="Of this attempt. Default: the newest.")
]
Follow = Annotated[
    bool, typer.Option("--follow", help="Go on with what comes, over new attempts, until the run has ended.")
]
Lines = Annotated[
    int | None,
    typer.Option("--lines", min=0, metavar="N", help="Begin with the last N lines. Default: all; 20 with --follow."),
]
Supervisor = Annotated[bool, typer.Option("--supervisor", help="What the supervisor of a launched job said.")]

_LOOK_EVERY_S = 0.25
_ASK_EVERY_S = 2.0
"""How often it is asked whether the run goes on: that reads several files, and may ask SLURM."""
_FOLLOWED_LINES = 20


def logs(
    out: Output,
    run: Run,
    rank: Rank = None,
    attempt: Attempt = None,
    follow: Follow = False,
    lines: Lines = None,
    supervisor: Supervisor = False,
) -> int:
    """Show what the ranks of a run have printed; the same line of many ranks is one, with their numbers in front."""
    from launcher.run_record import find_run

    if supervisor and (rank is not None or attempt is not None):
        raise ConfigError("--supervisor shows no rank and no attempt: leave --rank and --attempt out")
    if follow and out.as_json:
        raise ConfigError("--json answers once, and --follow goes on: leave one of them out")
    directory = find_run(run, launched=True)
    source = _supervisor_log(directory) if supervisor else _rank_logs(directory, rank, attempt)
    try:
        if follow:
            _go_on(out, directory, source, _FOLLOWED_LINES if lines is None else lines)
        else:
            _show(out, directory, source, lines)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What is read: a log that may be another one as time goes on."""

    find: Callable[[Callable[[], float] | None, int | None], tuple[Log, int | None] | None]
    """With the clock of logs that grow, and the number of last lines that are wanted: the log, and of which attempt."""
    missing: Callable[[], RunError]
    """Why there is none."""
    is_newest: Callable[[int | None], bool]
    """Whether no later attempt than this one has begun."""
    goes_on: bool
    """Whether later attempts are wanted too."""


def _rank_logs(directory: RunDirectory, rank: int | None, attempt: int | None) -> _Source:
    from launcher.jobs.inspection.log_reading import logs_of, missing_logs, newest_attempt

    def find(clock: Callable[[], float] | None, lines: int | None) -> tuple[Log, int | None] | None:
        number = newest_attempt(directory) if attempt is None else attempt
        log = None if number is None else logs_of(directory, number, rank, clock=clock, lines=lines)
        return None if log is None else (log, number)

    def missing() -> RunError:
        return missing_logs(directory, newest_attempt(directory) if attempt is None else attempt, rank)

    return _Source(
        find=find,
        missing=missing,
        is_newest=lambda number: number == newest_attempt(directory),
        goes_on=attempt is None,
    )


def _supervisor_log(directory: RunDirectory) -> _Source:
    from launcher.jobs.inspection.log_reading import GrowingLog, log_from_end
    from launcher.jobs.job_record import JobFolder

    path = JobFolder(directory).output

    def find(clock: Callable[[], float] | None, lines: int | None) -> tuple[GrowingLog, int | None] | None:
        return (log_from_end(path, lines), None) if path.is_file() else None

    def missing() -> RunError:
        return RunError(f"{path}: is not there; a supervisor on this machine speaks on its terminal")

    return _Source(find=find, missing=missing, is_newest=lambda number: True, goes_on=False)


def _show(out: Output, directory: RunDirectory, source: _Source, lines: int | None) -> None:
    from launcher.jobs.inspection.log_reading import all_lines

    found = source.find(None, lines)
    if found is None:
        raise source.missing()
    log, attempt = found
    text: Iterable[str] = all_lines(log)
    if lines is not None:
        text = deque(text, maxlen=lines)
    if out.as_json:
        out.result({"run_dir": str(directory.root), "attempt": attempt, "lines": list(text)})
        return
    for line in text:
        out.say(line)


def _go_on(out: Output, directory: RunDirectory, source: _Source, lines: int) -> None:
    """Until the run has ended, or the attempt that was asked for is not the newest one any more."""
    log: Log | None = None
    attempt: int | None = None
    wanted: int | None = lines  # of what is there at first; all of what comes
    asked, has_ended, has_shown = -_ASK_EVERY_S, False, False
    while True:
        if log is None and (found := source.find(time.monotonic, wanted)) is not None:
            log, attempt = found
            has_shown = True
        if log is not None and (said := log.more()):
            _say(out, said, wanted)
            wanted = None
        elif time.monotonic() >= asked + _ASK_EVERY_S:
            # Then it is read once more: what was said last stands there by now.
            asked, has_ended = time.monotonic(), _nothing_comes(directory)
        elif log is not None and (has_ended or not source.is_newest(attempt)):
            _say(out, log.rest(), wanted)
            wanted = log = None
            if not source.goes_on or source.is_newest(attempt):
                return
        elif not has_ended:
            time.sleep(_LOOK_EVERY_S)
        elif has_shown:
            return
        else:
            raise source.missing()


def _nothing_comes(directory: RunDirectory) -> bool:
    from launcher.jobs.inspection.log_reading import newest_attempt
    from launcher.jobs.inspection.status import run_status
    from launcher.jobs.job_record import JobFolder

    # A run of one process, which nobody has launched, writes no logs, however long it goes on.
    never = newest_attempt(directory) is None and not JobFolder(directory).root.exists()
    return never or run_status(directory).has_ended


def _say(out: Output, said: list[str], wanted: int | None) -> None:
    """The last ones that are wanted."""
    for line in said if wanted is None else said[len(said) - min(wanted, len(said)) :]:
        out.say(line)
