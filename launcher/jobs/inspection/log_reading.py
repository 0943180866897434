"""The logs of a run, read while they grow: the job's folded one, or those of single ranks, folded here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from launcher.errors import RunError
from launcher.jobs.agents.log_folding import Folder
from launcher.jobs.agents.rank_logs import LineSplitter, as_text
from launcher.jobs.backends.starter import AGENTS_LOG, last_words
from launcher.jobs.inspection.run_facts import attempt_numbers
from megamodel.train.run_directory import RunDirectory

_CHUNK_BYTES = 1 << 18
_FOLDED_ROWS = 5_000
"""Where no time is known, lines of several ranks are the same when they stand so near to one another in their files."""


class GrowingLog:
    """One file, read on from where the last look has ended. It need not be there yet."""

    def __init__(self, path: Path, *, begin: int = 0) -> None:
        self.path = path
        self._offset = begin
        self._lines = LineSplitter()

    def more(self) -> list[str]:
        """Lines that have been added: some of them, where there are many; none where no line has ended since."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                while data := file.read(_CHUNK_BYTES):
                    self._offset += len(data)
                    if lines := self._lines.feed(data):
                        return [as_text(line) for line in lines]
        except FileNotFoundError:
            pass
        return []

    def rest(self) -> list[str]:
        """The last line, where it has no end."""
        return [as_text(line) for line in self._lines.end()]


class FoldedLogs:
    """The logs of several ranks as one, in which equal lines are one with the ranks that say it in front."""

    def __init__(self, paths: dict[int, Path], *, clock: Callable[[], float] | None = None) -> None:
        """`paths` by rank. `clock` gives seconds where the files grow while they are read."""
        self._logs = {rank: GrowingLog(path) for rank, path in paths.items()}
        self._out: list[str] = []
        self._row = 0
        self._clock = clock
        window = {} if clock is not None else {"window_s": float(_FOLDED_ROWS)}
        self._folder = Folder(self._out.append, num_ranks=max(paths) + 1, **window)

    def more(self) -> list[str]:
        """See `GrowingLog`. Lines wait for a moment, for other ranks that may say the same."""
        while not self._out:
            found = {rank: log.more() for rank, log in self._logs.items()}
            if not any(found.values()):
                break
            self._take(found)
        self._folder.flush(self._now())
        return self._taken()

    def rest(self) -> list[str]:
        """All that still waits."""
        self._take({rank: log.rest() for rank, log in self._logs.items()})
        self._folder.close()
        return self._taken()

    def _take(self, found: dict[int, list[str]]) -> None:
        for row in zip_longest(*found.values()):
            self._row += 1
            for rank, line in zip(found, row, strict=True):
                if line is not None:
                    self._folder.add(rank, line, self._now())

    def _now(self) -> float:
        return self._clock() if self._clock is not None else float(self._row)

    def _taken(self) -> list[str]:
        taken = self._out[:]
        self._out.clear()
        return taken


Log = GrowingLog | FoldedLogs


def newest_attempt(run: RunDirectory) -> int | None:
    """Number of the newest attempt that has logs; None without one."""
    return max(attempt_numbers(run), default=None)


def logs_of(
    run: RunDirectory,
    attempt: int,
    rank: int | None,
    *,
    clock: Callable[[], float] | None = None,
    lines: int | None = None,
) -> Log | None:
    """What there is to read of an attempt, or of one rank in it; None while nothing is there. With `lines` files begin
    near so many lines before their end, but never after."""
    folder = run.logs / f"attempt-{attempt}"
    ranks = _logs_of_ranks(folder)
    if rank is not None:
        return log_from_end(ranks[rank], lines) if rank in ranks else None
    if (folder / "job.log").is_file():
        return log_from_end(folder / "job.log", lines)
    return FoldedLogs(ranks, clock=clock) if ranks else None


def missing_logs(run: RunDirectory, attempt: int | None, rank: int | None) -> RunError:
    """Says why there is nothing to read, and what there is."""
    numbers = attempt_numbers(run)
    if attempt is None or not numbers:
        return RunError(
            f"{run.root}: has no logs yet; a run of one process speaks on its terminal alone, and a job writes them once "
            "its ranks have started"
        )
    if attempt not in numbers:
        return RunError(f"{run.root}: has no attempt {attempt}; there are: {_list(numbers)}")
    ranks = list(_logs_of_ranks(run.logs / f"attempt-{attempt}"))
    if rank is None or not ranks:
        starter = run.logs / f"attempt-{attempt}" / AGENTS_LOG
        words = last_words(starter)
        said = f"; what starts its hosts has said: {words} (more in {starter})" if words else ""
        return RunError(f"{run.root}: no rank of attempt {attempt} has a log yet{said}")
    zero = " (rank 0 of `mega train` speaks on its terminal)" if rank == 0 else ""
    return RunError(f"{run.root}: rank {rank} has no log in attempt {attempt}{zero}; there are: {_list(ranks)}")


def all_lines(log: Log) -> Iterator[str]:
    """Everything that is there now."""
    while lines := log.more():
        yield from lines
    yield from log.rest()


def log_from_end(path: Path, lines: int | None) -> GrowingLog:
    """The log at `path`, with `lines` from near so many lines before its end, but never after."""
    return GrowingLog(path, begin=0 if lines is None else _begin_of_last(path, lines))


def _begin_of_last(path: Path, lines: int) -> int:
    """Where the last so many lines of a file begin, in bytes."""
    with path.open("rb") as file:
        start = file.seek(0, os.SEEK_END)
        missing = lines + 1  # the last one's end is no line's begin
        while start > 0:
            length = min(_CHUNK_BYTES, start)
            start -= length
            file.seek(start)
            block = file.read(length)
            count = block.count(b"\n")
            if count >= missing:
                place = len(block)
                for _ in range(missing):
                    place = block.rfind(b"\n", 0, place)
                return start + place + 1
            missing -= count
    return 0


def _logs_of_ranks(folder: Path) -> dict[int, Path]:
    """By rank, ascending."""
    names = {path: path.name.removeprefix("rank-").removesuffix(".log") for path in folder.glob("rank-*.log")}
    return dict(sorted((int(name), path) for path, name in names.items() if name.isdecimal()))


def _list(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:20]))
    return shown if len(numbers) <= 20 else f"{shown}, ... to {numbers[-1]}"
