"""Which of several failed ranks is the first cause, and the words for how a rank ended. For whoever starts ranks."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from typing import Protocol, TypeVar

from launcher.failure_record import FailureRecord
from launcher.rank_process import EXIT_STOPPED


class RankEnd(Protocol):
    """A rank that has ended, as the process that started it saw it."""

    @property
    def code(self) -> int:
        """Exit code; negative: the signal that ended it."""
        ...

    @property
    def at(self) -> float:
        """When it was seen to have ended, in seconds since 1970."""
        ...

    @property
    def record(self) -> FailureRecord | None:
        """What it has left of its failure."""
        ...

    @property
    def last_line(self) -> str:
        """The last line that it wrote; empty where there is none."""
        ...

    @property
    def ended_by_us(self) -> bool:
        """Whether it was made to end, and so its end says nothing."""
        ...


End = TypeVar("End", bound=RankEnd)


def failures(ends: Iterable[End]) -> list[End]:
    """Those that neither are done (0) nor have stopped in good order (75). Whether 0 was too early, the run's result tells."""
    return [end for end in ends if end.code not in (0, EXIT_STOPPED)]


def explains_itself(end: RankEnd) -> bool:
    """Whether the end can be a cause: it was not brought about by us, nor by the loss of another rank."""
    return not end.ended_by_us and not (end.record is not None and end.record.lost_a_peer)


def have_stopped(ends: Iterable[RankEnd], *, was_asked: bool) -> bool:
    """Whether the run has stopped in good order: a rank ends with 75 only when nothing that was trained is lost; the others
    can but miss it. `was_asked`: somebody wanted it to stop; else a rank that we have ended does so before its first step."""
    ends = list(ends)
    has_stopped = any(end.code == EXIT_STOPPED and (was_asked or not end.ended_by_us) for end in ends)
    return has_stopped and not any(map(explains_itself, failures(ends)))


def failed_at(end: RankEnd) -> float:
    """When it failed, in seconds since 1970: its own account tells better than its end, which may come late."""
    return end.at if end.record is None else end.record.at


def first_failure(ends: Iterable[End]) -> End | None:
    """The failure that is the likeliest cause of the others; None where no rank has failed."""
    return min(failures(ends), key=earliness, default=None)


def earliness(end: RankEnd) -> tuple[bool, bool, float]:
    """Orders failures by how likely they are the cause of the others: ended by us counts last, then those who only tell that
    they have lost another rank; among equals the earliest. The last figure is in seconds since 1970."""
    return end.ended_by_us, not explains_itself(end), failed_at(end)


def how_it_ended(end: RankEnd) -> str:
    """What follows "rank 3" in a sentence: ": the disk is full", " was killed by SIGKILL; ..." or " ended with exit code 5".
    0 is that of a rank that has ended too early."""
    if end.record is not None:
        return f": {end.record.message}"
    if end.code < 0:
        name = signal_name(-end.code)
        hint = "; the kernel does this when memory runs out" if name == "SIGKILL" else ""
        return f" was killed by {name}{hint}"
    how = " ended before the run was done, with exit code 0" if end.code == 0 else f" ended with exit code {end.code}"
    return how + (f": {end.last_line}" if end.last_line else "")


def signal_name(number: int) -> str:
    """SIGKILL for 9; "signal 40" for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
