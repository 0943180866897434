"""The ranks of one agent where torchrun starts them: it is the agent's child, and they are torchrun's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from launcher.child_ranks import ChildRank
from launcher.failure_record import FailureRecord
from launcher.first_cause import signal_name
from launcher.jobs.agents.agent_ranks import AgentRanks, not_started
from launcher.jobs.agents.protocol import ATTEMPT, Ended, Start
from launcher.jobs.torchrun.order import TorchrunOrder, without_settings
from launcher.rank_process import EXIT_STOPPED, SUPERVISOR_PID, stop_signals

_READ_BYTES = 1 << 16
_TAIL_BYTES = 4096


@dataclass(eq=False, kw_only=True)
class _Torchrun:
    """torchrun's process, and what it has told of its ranks."""

    process: subprocess.Popen[bytes]
    reports: int
    """Where it tells; not blocking."""
    log: Path
    """What it prints itself."""
    pids: dict[int, int] = field(default_factory=dict)
    codes: dict[int, int] = field(default_factory=dict)
    ends: dict[int, float] = field(default_factory=dict)
    """Seconds since 1970."""
    died_at: float | None = None
    is_stopped: bool = False
    """Whether it was asked to stop before it had ranks."""
    _rest: bytes = b""

    def look(self) -> None:
        """Takes what is told; notices its end."""
        if self.died_at is not None:
            return
        has_ended = self.process.poll() is not None
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.reports, _READ_BYTES):
                *lines, self._rest = (self._rest + data).split(b"\n")
                for line in lines:
                    self._take(json.loads(line))
        if has_ended:
            self.died_at = time.time()

    def _take(self, report: Mapping[str, Any]) -> None:
        if "pid" in report:
            self.pids[report["rank"]] = report["pid"]
        else:
            self.codes[report["rank"]] = report["code"]
            self.ends[report["rank"]] = report["at"]

    def how_it_died(self) -> str:
        """In one line."""
        code = self.process.returncode
        if code < 0:
            return f"torchrun's agent was killed by {signal_name(-code)}, and its ranks with it"
        return f"torchrun's agent ended with exit code {code}: {self._last_line()} (its log: {self.log})"

    def _last_line(self) -> str:
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
            return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return "its log cannot be read"


@dataclass(eq=False, kw_only=True)
class _TorchrunRank(ChildRank):
    """A child of torchrun. `process` is torchrun's."""

    torchrun: _Torchrun

    def has_ended(self) -> bool:
        """Whether torchrun has told so, or is gone itself: the kernel has killed its ranks then."""
        self.torchrun.look()
        if self.ended_at is None and (self.number in self.torchrun.codes or self.torchrun.died_at is not None):
            self.ended_at = time.monotonic()
        return self.ended_at is not None

    @property
    def code(self) -> int:
        """As torchrun has told; else 1, or 75 where there was nothing to save yet."""
        nothing_yet = self.torchrun.is_stopped and self.number not in self.torchrun.pids
        return self.torchrun.codes.get(self.number, EXIT_STOPPED if nothing_yet else 1)

    @property
    def at(self) -> float:
        """In seconds since 1970."""
        return self.torchrun.ends.get(self.number) or self.torchrun.died_at or super().at

    @property
    def record(self) -> FailureRecord | None:
        """Its own, else that of torchrun."""
        own = super().record
        if own is not None or self.number in self.torchrun.codes or self.code == EXIT_STOPPED:
            return own
        return FailureRecord(at=self.at, message=self.torchrun.how_it_died(), exit_code=1, traceback="")

    def signal(self, number: int) -> None:
        """Sends a signal to the rank; before it is there, one that asks to stop ends torchrun."""
        if self.has_ended():
            return
        if (pid := self.torchrun.pids.get(self.number)) is not None:
            with contextlib.suppress(ProcessLookupError):  # torchrun is about to tell
                os.kill(pid, number)
        elif number in stop_signals():
            self.torchrun.is_stopped = True
            self.torchrun.process.kill()

    def end_now(self) -> None:
        """Kills the rank and all that it started, and torchrun with all its other ranks."""
        if self.has_ended():
            return
        self.ended_by_us = True
        if (pid := self.torchrun.pids.get(self.number)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.torchrun.process.kill()  # which may hang, and tell nothing


class TorchrunRanks(AgentRanks):
    """Has torchrun start the ranks: see `AgentRanks`."""

    _torchrun: _Torchrun | None = None

    def close(self) -> None:
        """Kills what still runs, torchrun too."""
        super().close()
        if self._torchrun is not None:
            asyncio.get_running_loop().remove_reader(self._torchrun.reports)
            self._torchrun.process.kill()
            self._torchrun.process.wait()
            os.close(self._torchrun.reports)

    def _start_all(self, order: Start, environ: Mapping[str, str]) -> list[Ended]:
        pipes = [os.pipe() for _ in (*order.ranks, None)]
        reads, writes = [read for read, _ in pipes], [write for _, write in pipes]
        log = Path(order.directory) / f"torchrun-{order.ranks[0] // order.ranks_on_host}.log"
        try:
            with log.open("ab") as output:
                process = _start(_ordered(order, writes, attempt=environ[ATTEMPT]), order, environ, writes, output)
        except (OSError, ValueError) as error:
            for read in reads:
                os.close(read)
            return [not_started(rank, order, error) for rank in order.ranks]
        finally:
            for write in writes:
                os.close(write)
        os.set_blocking(reads[-1], False)
        self._torchrun = _Torchrun(process=process, reports=reads[-1], log=log)
        asyncio.get_running_loop().add_reader(reads[-1], self._hear)
        for rank, read in zip(order.ranks, reads):
            record = Path(order.directory) / f"rank-{rank}.failure.json"
            child = _TorchrunRank(number=rank, process=process, failure_file=record, torchrun=self._torchrun)
            self._stand_by(child, read, order)
        return []

    def _hear(self) -> None:
        assert self._torchrun is not None
        self._torchrun.look()
        if self._torchrun.died_at is not None:
            asyncio.get_running_loop().remove_reader(self._torchrun.reports)
        self.look()


def _ordered(order: Start, files: list[int], *, attempt: str) -> TorchrunOrder:
    *outputs, reports = files
    return TorchrunOrder(
        num_nodes=order.num_ranks // order.ranks_on_host,
        node_rank=order.ranks[0] // order.ranks_on_host,
        ranks_per_node=order.ranks_on_host,
        address=order.master_address,
        port=order.master_port,
        name=f"attempt-{attempt}",
        command=order.command,
        outputs=tuple(outputs),
        reports=reports,
        directory=order.directory,
    )


def _start(
    ordered: TorchrunOrder, order: Start, environ: Mapping[str, str], files: list[int], output: BinaryIO
) -> subprocess.Popen[bytes]:
    """torchrun begins as a rank does: see `launcher.child_ranks.start_child`."""
    return subprocess.Popen(
        (sys.executable, "-m", "launcher.jobs.torchrun.process", ordered.as_text()),
        env={**without_settings(environ), SUPERVISOR_PID: str(os.getpid())},
        cwd=order.working_directory,
        pass_fds=files,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )
