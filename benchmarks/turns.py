"""Several training loops, timed in turn in one process: a block of steps of the first, one of the second, and so on.

Each loop keeps its own control flow (some of them are other people's), so each has a thread; the baton lets exactly one
of them run at any time. Whatever slows the machine down for a while then slows all of them down.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


class Enough(Exception):  # noqa: N818 - no error: it is how a loop without an end is left
    """Raised in a loop after its last step."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many steps are timed. A warm-up block, which compiles, comes before and is not counted."""

    warmup_steps: int
    blocks: int
    block_steps: int


class Turns:
    """Hands the baton round. A loop calls `step_done` after each of its steps."""

    def __init__(self, plan: Plan, names: list[str]) -> None:
        self.plan = plan
        self.seconds: dict[str, list[list[float]]] = {name: [] for name in names}
        """Of each loop, each block, each step; wall clock from one step's end to the next one's, all overhead included."""
        self.cpu_seconds: dict[str, float] = dict.fromkeys(names, 0.0)
        """Processor time of all threads in the timed steps of each loop: work, and waiting that spins, but no one else's."""
        self._names = names
        self._baton = threading.Condition()
        self._holder = names[0]
        self._failed = False
        self._block: dict[str, list[float]] = {name: [] for name in names}
        self._warm: set[str] = set()
        self._mark = 0.0
        self._cpu_mark = 0.0

    def run(self, loops: Mapping[str, Callable[[], None]]) -> None:
        """Runs all loops to their ends, the first in this thread (it may want signals). Raises what one of them raised."""
        errors: list[BaseException] = []
        threads = [
            threading.Thread(target=self._run_one, args=(name, loops[name], errors), name=name, daemon=True)
            for name in self._names[1:]
        ]
        for thread in threads:
            thread.start()
        self._run_one(self._names[0], loops[self._names[0]], errors)
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def step_done(self, name: str) -> None:
        """Notes the time of the step; at the end of a block returns only when it is this loop's turn again."""
        block = self._block[name]
        block.append(time.perf_counter() - self._mark)
        if len(block) == (self.plan.block_steps if name in self._warm else self.plan.warmup_steps):
            if name in self._warm:
                self.seconds[name].append(block)
                self.cpu_seconds[name] += time.process_time() - self._cpu_mark
            self._warm.add(name)
            self._block[name] = []
            if len(self.seconds[name]) == self.plan.blocks:
                raise Enough
            self._pass_on(name)
            self._wait(name)
            self._cpu_mark = time.process_time()
        self._mark = time.perf_counter()

    def _run_one(self, name: str, loop: Callable[[], None], errors: list[BaseException]) -> None:
        try:
            self._wait(name)
            self._mark = time.perf_counter()
            loop()
            raise RuntimeError(f"the loop {name} ended before the benchmark did")
        except Enough:
            self._pass_on(name)
        except BaseException as error:
            errors.append(error)
            with self._baton:
                self._failed = True
                self._baton.notify_all()

    def _wait(self, name: str) -> None:
        with self._baton:
            self._baton.wait_for(lambda: self._holder == name or self._failed)
        if self._failed:
            raise Enough

    def _pass_on(self, name: str) -> None:
        with self._baton:
            self._holder = self._names[(self._names.index(name) + 1) % len(self._names)]
            self._baton.notify_all()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One loop against another. Above 1: the first is faster."""

    ratio: float
    """Of the medians of all step times."""
    by_round: list[float]
    """Of the medians of the two blocks of each round, which ran one after the other."""
    cpu_ratio: float
    """Of processor time, which other programs on the machine hardly touch."""

    @property
    def ratio_of_rounds(self) -> float:
        """The median of `by_round`: it holds still while the machine speeds up and slows down between rounds."""
        return statistics.median(self.by_round)


def compare(turns: Turns, name: str, other: str) -> Comparison:
    """How many times faster `name` is than `other`."""
    return Comparison(
        ratio=median_step(turns, other) / median_step(turns, name),
        by_round=[
            statistics.median(theirs) / statistics.median(ours)
            for ours, theirs in zip(turns.seconds[name], turns.seconds[other], strict=True)
        ],
        cpu_ratio=turns.cpu_seconds[other] / turns.cpu_seconds[name],
    )


def median_step(turns: Turns, name: str) -> float:
    """Seconds of a step of one loop."""
    return statistics.median(second for block in turns.seconds[name] for second in block)
