"""A program that starts agents, and ends when they have ended: mpirun, or the only agent itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from launcher.errors import RunError

AGENTS_LOG = "agents.log"
"""In an attempt's folder: what the starter prints, and what agents print themselves."""
_POLL_SECONDS = 0.05
_END_SECONDS = 5.0
_TAIL_BYTES = 16_384
_COMPLAINT = re.compile(
    r"error|fail|could ?n.t|could not|cannot|unable|refused|denied|no route|not found|unknown|unrecogni[sz]ed|invalid|illegal"
    r"|no such",
    re.I,
)


class Starter:
    """The running program: `launcher.jobs.backend.Agents`. It leads its own session, which the terminal's Ctrl-C does not
    reach, and nothing of its process group outlives it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @classmethod
    def start(cls, command: Sequence[str], *, environ: Mapping[str, str], output: Path) -> Starter:
        """Starts `command`; what it prints is appended to `output`. Raises RunError where that is impossible."""
        try:
            with output.open("ab") as file:
                process = subprocess.Popen(
                    command,
                    env=dict(environ),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise RunError(f"{command[0]} cannot be started: {error}") from error
        return cls(process)

    async def wait(self) -> int:
        """Until it has ended; its exit code, negative: a signal."""
        while not self._has_ended():
            await asyncio.sleep(_POLL_SECONDS)
        return int(self._process.returncode)

    def signal(self, number: int) -> None:
        """Sends a signal to the program alone."""
        if not self._has_ended():
            os.kill(self._process.pid, number)

    async def end(self) -> None:
        """Asks it to end, then kills it and all of its process group."""
        if not self._has_ended():
            os.kill(self._process.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wait(), _END_SECONDS)
        if not self._has_ended():
            self._kill_group()
            await self.wait()

    def _has_ended(self) -> bool:
        if self._process.returncode is not None:
            return True
        if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        self._kill_group()  # before it is reaped, so that its id cannot mean anybody else yet
        self._process.wait()
        return True

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def last_words(output: Path) -> str:
    """What a starter that failed complained of first, in one line; without a complaint its last line, if any."""
    lines = _tail(output)
    return next(filter(_COMPLAINT.search, lines), lines[-1] if lines else "")


def hosts_in_words(output: Path, hosts: Collection[str]) -> tuple[str, ...]:
    """Those of `hosts` of which a starter that failed complained first; none where it names all, since then none is at
    fault."""
    for line in filter(_COMPLAINT.search, _tail(output)):
        named = tuple(host for host in hosts if re.search(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", line))
        if named:
            return named if len(named) < len(hosts) else ()
    return ()


def _tail(output: Path) -> list[str]:
    """Its last lines that hold a word; frames and empty lines are none."""
    try:
        with output.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
