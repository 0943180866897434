"""A rank as a child process: its start, its end, and the end of all that it has started.

Every child leads its own session, so that a terminal's signals reach it once, through its parent, and all that it starts
can be ended with it. It begins with `launcher.rank_process.enter`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from launcher.failure_record import FailureRecord, read_failure
from launcher.rank_process import FAILURE_FILE, SUPERVISOR_PID


@dataclass(kw_only=True)
class ChildRank:
    """One child."""

    number: int
    process: subprocess.Popen[bytes]
    failure_file: Path
    log: Path | None = None
    """File that takes its output, where one does."""
    ended_at: float | None = None
    """By the monotonic clock."""
    ended_by_us: bool = False

    def has_ended(self) -> bool:
        """Looks after the process. Once it has ended, what it started ends too, and its exit code is known."""
        if self.ended_at is not None:
            return True
        if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        self.ended_at = time.monotonic()
        self._kill_group()  # before it is reaped, so that its id cannot mean anybody else yet
        self.process.wait()
        return True

    @property
    def code(self) -> int:
        """Of an ended rank: its exit code; negative: a signal."""
        return int(self.process.returncode)

    @property
    def at(self) -> float:
        """When it was seen to have ended, in seconds since 1970."""
        return time.time() - (time.monotonic() - (self.ended_at or time.monotonic()))

    @property
    def record(self) -> FailureRecord | None:
        """What it has left of its failure."""
        return read_failure(self.failure_file)

    @property
    def last_line(self) -> str:
        """The last line of its log."""
        return "" if self.log is None else _last_line(self.log)

    def signal(self, number: int) -> None:
        """Sends a signal to the rank alone."""
        if not self.has_ended():
            os.kill(self.process.pid, number)

    def end_now(self) -> None:
        """Kills the rank and all that it started."""
        if not self.has_ended():
            self.ended_by_us = True
            self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def start_child(
    command: Sequence[str],
    *,
    rank: int,
    local_rank: int,
    environ: Mapping[str, str],
    failure_file: Path,
    output: IO[bytes] | int | None,
    log: Path | None = None,
    directory: Path | None = None,
) -> ChildRank:
    """Starts `command` as rank `rank`, with what `environ` and its place say.

    Call it in the main thread with the stop signals blocked: the child begins so, and dies with the thread that started
    it. `output` takes what it prints (None: this process's own streams). `directory`: where it runs.
    Raises OSError or ValueError where the command cannot be executed.
    """
    process = subprocess.Popen(
        command,
        env={
            **environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            SUPERVISOR_PID: str(os.getpid()),
            FAILURE_FILE: str(failure_file.absolute()),
        },
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
    )
    return ChildRank(number=rank, process=process, failure_file=failure_file, log=log)


def threads_of_a_rank(environ: Mapping[str, str], *, num_cores: int, num_ranks: int) -> str:
    """OMP_NUM_THREADS: what the user has set, else an equal share of the cores."""
    return environ.get("OMP_NUM_THREADS") or str(max(1, num_cores // num_ranks))


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
