"""Runs N ranks on this machine as child processes, and stands by them until the last has ended.

One child (`launcher.child_ranks`) is one rank, told of its place by torchrun's variables. Rank 0 speaks on this terminal;
the others write to files of their own. A rank that fails ends the run: the others get a few seconds, then they are
killed, and the first cause is what the user reads.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.child_ranks import ChildRank, free_port, start_child, threads_of_a_rank
from launcher.errors import RankError
from launcher.failure_record import FailureRecord
from launcher.first_cause import first_failure, have_stopped, how_it_ended
from launcher.rank_process import EXIT_INTERRUPTED, EXIT_STOPPED, stop_signals

_POLL_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Grace:
    """How long the other ranks may take, in seconds."""

    own_end: float = 3.0
    """After a failure: to fail by themselves, which leaves their account of it."""
    terminated: float = 6.0
    """Then: to end on SIGTERM, before they are killed."""
    stopped: float = 60.0
    """After one rank has stopped in good order (75): to do the same."""
    done: float = math.inf
    """After rank 0 has done all (0): to end too."""


@dataclass(kw_only=True)
class _Ranks:
    """All children, and the state of ending them."""

    ranks: list[ChildRank]
    signals: frozenset[signal.Signals]
    grace: Grace
    say: Callable[[str], None]
    forwarded: set[int] = field(default_factory=set)
    interrupted: bool = False
    """A second Ctrl-C has ended the ranks at once."""

    def supervise(self) -> None:
        """Returns when every rank has ended."""
        terminated = False
        while running := [rank for rank in self.ranks if not rank.has_ended()]:
            arrived = signal.sigtimedwait(self.signals, _POLL_SECONDS)
            if arrived is not None:
                self._forward(arrived.si_signo, running)
            now = time.monotonic()
            failed = self._first_end(lambda code: code not in (0, EXIT_STOPPED))
            stopped = self._first_end(lambda code: code == EXIT_STOPPED)
            if failed is not None and now > failed + self.grace.own_end and not terminated:
                terminated = True
                for rank in running:
                    rank.ended_by_us = True
                    rank.signal(signal.SIGTERM)
            done = self.ranks[0].ended_at if self.ranks[0].process.returncode == 0 else None
            late = failed is not None and now > failed + self.grace.own_end + self.grace.terminated
            late |= stopped is not None and now > stopped + self.grace.stopped
            if late or (done is not None and now > done + self.grace.done):
                for rank in running:
                    rank.end_now()

    def _first_end(self, match: Callable[[int], bool]) -> float | None:
        ends = [rank.ended_at for rank in self.ranks if rank.ended_at is not None and match(rank.process.returncode)]
        return min(ends, default=None)

    def _forward(self, number: int, running: Sequence[ChildRank]) -> None:
        """Passes a stop signal on, each kind once. A second Ctrl-C means: at once, without saving."""
        if number in self.forwarded:
            if number == signal.SIGINT:
                self.interrupted = True
                self.say("Ending at once. The last complete checkpoint stays.")
                for rank in running:
                    rank.end_now()
            return
        self.forwarded.add(number)
        if number == signal.SIGINT:
            self.say("Stopping after this step and saving; Ctrl-C again ends at once.")
        for rank in running:
            rank.signal(signal.SIGTERM if number == signal.SIGHUP else number)


def run_local_ranks(
    arguments: Sequence[str],
    *,
    num_ranks: int,
    log_directory: Path,
    environ: Mapping[str, str],
    num_cores: int,
    say: Callable[[str], None],
    command: Sequence[str] = (sys.executable, "-m", "launcher"),
    grace: Grace | None = None,
) -> int:
    """Runs `command arguments` as `num_ranks` ranks; returns 0, or 75 when they stopped early after saving.

    Rank R > 0 writes to `log_directory/rank-R.log`, and every failing rank its reason to `rank-R.failure.json`.
    Cores are shared out through OMP_NUM_THREADS, unless `environ` sets it. `say` gets lines for the user.

    Must be called from the main thread. Raises RankError with the first cause when a rank fails.
    """
    signals = stop_signals()
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    started: list[ChildRank] = []
    try:
        shared = {
            **environ,
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": threads_of_a_rank(environ, num_cores=num_cores, num_ranks=num_ranks),
        }
        for number in range(num_ranks):
            started.append(_start((*command, *arguments), number, shared, log_directory))
        ranks = _Ranks(ranks=started, signals=signals, grace=grace or Grace(), say=say)
        ranks.supervise()
        return _outcome(started, stop_asked=bool(ranks.forwarded), interrupted=ranks.interrupted)
    finally:
        for rank in started:
            rank.end_now()
            rank.process.wait()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)


def _start(command: Sequence[str], number: int, shared: Mapping[str, str], log_directory: Path) -> ChildRank:
    log = log_directory / f"rank-{number}.log" if number > 0 else None
    with contextlib.ExitStack() as stack:
        return start_child(
            command,
            rank=number,
            local_rank=number,
            environ=shared,
            failure_file=log_directory / f"rank-{number}.failure.json",
            output=stack.enter_context(log.open("wb")) if log else None,
            log=log,
        )


def _outcome(ranks: Sequence[ChildRank], *, stop_asked: bool, interrupted: bool) -> int:
    """The exit code of the run; raises RankError where a rank failed."""
    if have_stopped(ranks, was_asked=stop_asked):
        return EXIT_STOPPED
    first = first_failure(ranks)
    if first is None:
        return 0
    if stop_asked and first.ended_by_us:
        raise RankError(
            "ended before a checkpoint was saved; the same command continues from the last complete one",
            exit_code=EXIT_INTERRUPTED if interrupted else 1,
        )
    record = first.record
    raise RankError(_first_cause(first, record, len(ranks)), exit_code=record.exit_code if record else 1)


def _first_cause(rank: ChildRank, record: FailureRecord | None, num_ranks: int) -> str:
    where = f" (its log: {rank.log})" if rank.log else ""
    told = f"rank {rank.number} of {num_ranks}{how_it_ended(rank)}{where}"
    if record is not None:
        return "\n".join(filter(None, [record.traceback.rstrip(), told]))
    return f"{told}; the same command continues from the last checkpoint" if rank.code < 0 else told
