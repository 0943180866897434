"""Messages of ranks become steps, and steps windows, also where some rank does not get through. Pure; without torch."""

from __future__ import annotations

from collections import Counter

from cluster.fabric.monitor.durations import StepDurations
from cluster.fabric.monitor.windows import LEAST_SAMPLES, Sample, Window, window_of

DEADLINE_SECONDS = 5.0
"""Ranks leave a step together, and a message takes milliseconds: what has not come by now has been lost."""
SILENT_STEPS = 12
"""Steps in a row that a rank should have told of, and has not: it is told that it is silent."""
_MOST_PENDING = 64


class Gathering:
    """Accounts of ranks become samples once all ranks have told of a step, or once its deadline has passed and more than
    half have; samples become windows. Moments `now` are in seconds, of a clock that never jumps."""

    def __init__(self, *, world_size: int, window_steps: int) -> None:
        self._world_size = world_size
        self._window_steps = window_steps
        self._pending: dict[int, dict[int, StepDurations]] = {}
        self._since: dict[int, float] = {}
        self._samples: list[Sample] = []
        self._every: dict[int, int] = {}
        self._gone: set[int] = set()
        self._missed: Counter[int] = Counter()
        self._told_silent: set[int] = set()
        self._new_silent: set[int] = set()

    def add(self, rank: int, told: StepDurations, now: float) -> list[Window]:
        """One rank's account. The windows that it completes, which is at most one as long as no rank is silent."""
        self._every[rank] = told.every
        self._since.setdefault(told.step, now)
        by_rank = self._pending.setdefault(told.step, {})
        by_rank[rank] = told
        if len(by_rank) >= self._world_size - len(self._gone):
            # A rank's messages come in order: what is still open of earlier steps stays so.
            return self._close([step for step in self._pending if step <= told.step])
        while len(self._pending) > _MOST_PENDING:
            self._forget(min(self._pending))
        return []

    def expire(self, now: float) -> list[Window]:
        """To be called now and then. The windows that are complete without those who have not told by now."""
        return self._close([step for step, since in self._since.items() if now > since + DEADLINE_SECONDS])

    def leave_out(self, rank: int) -> None:
        """It has said that it tells no more."""
        self._gone.add(rank)

    def new_silent_ranks(self) -> tuple[int, ...]:
        """Ranks that should tell and do not, each once."""
        new, self._new_silent = self._new_silent, set()
        return tuple(sorted(new))

    def _close(self, steps: list[int]) -> list[Window]:
        windows = (self._take(step) for step in sorted(steps))
        return [window for window in windows if window is not None]

    def _take(self, step: int) -> Window | None:
        by_rank = self._forget(step)
        is_whole = len(by_rank) >= self._world_size - len(self._gone)
        if is_whole:
            self._missed.clear()
        elif not self._is_worth(step, by_rank):
            return None
        if self._samples and step <= self._samples[-1].step:
            if not is_whole:  # stragglers of a step that is closed
                return None
            self._samples = []  # the run went back to a checkpoint
        sample = Sample(step=step, ranks=dict(sorted(by_rank.items())))
        self._samples.append(sample)
        length = step - self._samples[0].step + max(told.every for told in by_rank.values())
        if len(self._samples) < LEAST_SAMPLES or length < self._window_steps:
            return None
        window = window_of(self._samples)
        self._samples = []
        return window

    def _is_worth(self, step: int, by_rank: dict[int, StepDurations]) -> bool:
        """Whether a step that not all have told of counts: not where some rank has left it out by its own choice."""
        absent = [rank for rank in range(self._world_size) if rank not in by_rank and rank not in self._gone]
        if any(step % self._every.get(rank, 1) for rank in absent):
            return False
        for rank in by_rank:
            self._missed.pop(rank, None)
        for rank in absent:
            self._missed[rank] += 1
            if self._missed[rank] >= SILENT_STEPS and rank not in self._told_silent:
                self._told_silent.add(rank)
                self._new_silent.add(rank)
        return 2 * len(by_rank) > self._world_size

    def _forget(self, step: int) -> dict[int, StepDurations]:
        del self._since[step]
        return self._pending.pop(step)
