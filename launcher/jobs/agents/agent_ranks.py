"""The ranks of one agent: child processes, what they print, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from launcher.child_ranks import ChildRank, start_child, threads_of_a_rank
from launcher.failure_record import FailureRecord
from launcher.jobs.agents.protocol import CHOSEN, HEAD, HOST_NAME, TOKEN, Ended, Start
from launcher.jobs.agents.rank_logs import CappedLog, LineQueue, LineSplitter, LogWriter, as_text
from launcher.rank_process import stop_signals

_READ_BYTES = 1 << 16
_MOST_READS_AT_END = 256
"""Of what an ended rank has left in its pipe, which holds far less; somebody else may go on writing."""
_PIPE_S = 1.0
"""How long the output of an ended rank is waited for, where what it started keeps the pipe open."""
_LONGEST_MESSAGE, _LONGEST_TRACEBACK = 10_000, 20_000
_LOG_END_S = 10.0
EXIT_NOT_STARTED = 127
"""Code of a rank whose command could not be executed, as shells have it."""
# The place of one process in an MPI job. Several ranks that inherit it would all claim it.
_MPI_PLACE = ("PMIX_", "PMI_", "OMPI_COMM_WORLD_")


@dataclass(eq=False, kw_only=True)
class _Rank:
    """One rank that has been started, and not been told to have ended."""

    child: ChildRank
    log: CappedLog
    pipe: int | None
    """Where its output comes from; None after its end."""
    splitter: LineSplitter = field(default_factory=LineSplitter)
    last_line: bytes = b""
    has_ended: bool = False


class AgentRanks:
    """Starts ranks, and stands by them. For the main thread of an event loop; `look` must be called at each SIGCHLD.

    Each line goes into `lines`, and all output into a log of the rank. `on_end` gets the end of each rank, after its lines.
    """

    def __init__(
        self,
        *,
        environ: Mapping[str, str],
        num_cores: int,
        lines: LineQueue,
        on_end: Callable[[Ended], None],
        say: Callable[[str], None],
    ) -> None:
        self._environ = environ
        self._num_cores = num_cores
        self._lines = lines
        self._on_end = on_end
        self._say = say
        self._ranks: list[_Rank] = []
        self._logs: LogWriter | None = None
        self._passed_on: set[int] = set()
        self._all_ended = asyncio.Event()
        self._all_ended.set()

    @property
    def are_running(self) -> bool:
        """Whether the end of any rank is still to be told."""
        return bool(self._ranks)

    def start(self, order: Start, *, host: str) -> list[Ended]:
        """Starts the ranks of `order` on this host, whose name is `host`; returns the ends of those that cannot be."""
        directory = Path(order.directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._say(f"{directory}: cannot be made ({error.strerror}); the ranks' logs are lost")
        self._logs = LogWriter(self._say)
        environ = rank_environ(self._environ, order, host=host, num_cores=self._num_cores)
        blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
        try:
            return self._start_all(order, environ)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)

    def signal(self, number: int) -> None:
        """Passes a signal on to all ranks; one that asks them to stop only once, however many ways it comes."""
        if number == signal.SIGHUP:
            number = signal.SIGTERM
        if number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            if number in self._passed_on:
                return
            self._passed_on.add(number)
        for rank in self._ranks:
            rank.child.signal(number)

    def end(self, *, at_once: bool) -> None:
        """Ends all ranks: asks them to, or kills them with all that they have started."""
        for rank in self._ranks:
            if not rank.child.has_ended():
                rank.child.ended_by_us = True
                if at_once:
                    rank.child.end_now()
        if not at_once:
            self.signal(signal.SIGTERM)

    async def until_ended(self, timeout_s: float) -> bool:
        """Waits until every rank's end has been told; returns whether it has."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_ended.wait(), timeout_s)
        return not self._ranks

    def look(self) -> None:
        """Finds the ranks whose process has ended, and tells so once all that they printed has been read."""
        for rank in tuple(self._ranks):
            if rank.has_ended or not rank.child.has_ended():
                continue
            rank.has_ended = True
            for _ in range(_MOST_READS_AT_END):
                if not self._read(rank):
                    break
            if rank.pipe is None:
                self._tell_end(rank)
            else:
                asyncio.get_running_loop().call_later(_PIPE_S, self._tell_end, rank)

    def close(self) -> None:
        """Kills what still runs, and writes the logs to their end."""
        for rank in self._ranks:
            rank.child.end_now()
            if rank.pipe is not None:
                self._close_pipe(rank)
        if self._logs is not None:
            self._logs.end(_LOG_END_S)

    def _start_all(self, order: Start, environ: Mapping[str, str]) -> list[Ended]:
        """Called with the stop signals blocked."""
        ends = [self._start(place, rank, order, environ) for place, rank in enumerate(order.ranks)]
        return [end for end in ends if end is not None]

    def _start(self, place: int, rank: int, order: Start, environ: Mapping[str, str]) -> Ended | None:
        read, write = os.pipe()
        try:
            child = start_child(
                order.command,
                rank=rank,
                local_rank=order.first_local_rank + place,
                environ=environ,
                failure_file=Path(order.directory) / f"rank-{rank}.failure.json",
                output=write,
                directory=Path(order.working_directory),
            )
        except (OSError, ValueError) as error:
            os.close(read)
            return not_started(rank, order, error)
        finally:
            os.close(write)
        self._stand_by(child, read, order)
        return None

    def _stand_by(self, child: ChildRank, read: int, order: Start) -> None:
        """Takes a rank that has been started, which prints into the pipe that ends in `read`."""
        os.set_blocking(read, False)
        log = CappedLog(Path(order.directory) / f"rank-{child.number}.log", max_bytes=order.max_log_bytes)
        assert self._logs is not None
        self._logs.write(log, b"")  # so that it is there
        started = _Rank(child=child, log=log, pipe=read)
        self._ranks.append(started)
        self._all_ended.clear()
        asyncio.get_running_loop().add_reader(read, self._on_output, started)

    def _on_output(self, rank: _Rank) -> None:
        self._read(rank)
        if rank.pipe is None and rank.has_ended:
            self._tell_end(rank)

    def _read(self, rank: _Rank) -> bool:
        """Takes what has been printed since; returns whether there may be more now."""
        if rank.pipe is None:
            return False
        try:
            data = os.read(rank.pipe, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._close_pipe(rank)
            return False
        assert self._logs is not None
        self._logs.write(rank.log, data)
        self._take(rank, rank.splitter.feed(data))
        return True

    def _take(self, rank: _Rank, lines: list[bytes]) -> None:
        for line in lines:
            self._lines.add(rank.child.number, line)
        rank.last_line = next((line for line in reversed(lines) if line.strip()), rank.last_line)

    def _close_pipe(self, rank: _Rank) -> None:
        assert rank.pipe is not None
        asyncio.get_running_loop().remove_reader(rank.pipe)
        os.close(rank.pipe)
        rank.pipe = None

    def _tell_end(self, rank: _Rank) -> None:
        if rank not in self._ranks:
            return
        if rank.pipe is not None:
            self._close_pipe(rank)
        self._take(rank, rank.splitter.end())
        assert self._logs is not None
        self._logs.close(rank.log)
        self._ranks.remove(rank)
        record = _record(rank.child)
        self._on_end(
            Ended(
                rank=rank.child.number,
                code=rank.child.code,
                at=rank.child.at,
                sent=time.time(),
                record=None if record is None else asdict(record),
                last_line=as_text(rank.last_line).strip(),
                ended_by_us=rank.child.ended_by_us,
            )
        )
        if not self._ranks:
            self._all_ended.set()


def rank_environ(environ: Mapping[str, str], order: Start, *, host: str, num_cores: int) -> dict[str, str]:
    """The environment that all ranks of `order` share, made from the agent's. `num_cores`: those that the agent may use."""
    hidden = _MPI_PLACE if len(order.ranks) > 1 else ()
    own = (HEAD, TOKEN, CHOSEN)
    kept = {name: value for name, value in environ.items() if name not in own and not name.startswith(hidden)}
    merged = {**kept, **order.environ}
    # One of several agents of a host either has cores of its own, or shares all of them with the others' ranks.
    is_bound = num_cores < (os.cpu_count() or num_cores)
    sharing = len(order.ranks) if is_bound else order.ranks_on_host
    return {
        **merged,
        "WORLD_SIZE": str(order.num_ranks),
        "LOCAL_WORLD_SIZE": str(order.ranks_on_host),
        "MASTER_ADDR": order.master_address,
        "MASTER_PORT": str(order.master_port),
        "OMP_NUM_THREADS": threads_of_a_rank(merged, num_cores=num_cores, num_ranks=sharing),
        HOST_NAME: host,
        **({} if merged.get("OMP_NUM_THREADS") else {CHOSEN: "OMP_NUM_THREADS"}),
    }


def not_started(rank: int, order: Start, error: OSError | ValueError) -> Ended:
    """The end of a rank whose command could not be executed."""
    reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    message = f"{order.command[0]} cannot be started in {order.working_directory} ({reason}): do all hosts see it?"
    record = FailureRecord(at=time.time(), message=message, exit_code=EXIT_NOT_STARTED, traceback="")
    return Ended(
        rank=rank,
        code=EXIT_NOT_STARTED,
        at=record.at,
        sent=record.at,
        record=asdict(record),
        last_line=message,
        ended_by_us=False,
    )


def _record(child: ChildRank) -> FailureRecord | None:
    try:
        record = child.record
    except (OSError, ValueError, TypeError):  # damaged, as on a full disk
        return None
    if record is None:
        return None
    return replace(
        record, message=str(record.message)[:_LONGEST_MESSAGE], traceback=str(record.traceback)[-_LONGEST_TRACEBACK:]
    )
