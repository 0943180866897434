"""Python stacks of a rank on demand, in a file of the run's directory.

The rank's own thread writes those of all threads (`StackFile.write`): it holds the interpreter meanwhile, so that no frame
changes while it is read. Where that thread cannot run, since something holds the interpreter, a signal has its handler in C
write the main thread's (`ask`). The handler leaves the other threads alone: reading frames that are in use ends the process
(faulthandler, all_threads=True: five of five processes with a busy thread died). A process that cannot answer, being stopped
or gone, gets an account of what the kernel still knows (`account_for`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from cluster.fabric.watch.processes import ProcessId, lives

FOLDER = "stacks"


def stack_file(directory: Path, rank: int) -> Path:
    """Where a rank's stacks are."""
    return directory / FOLDER / f"rank-{rank}.txt"


class StackFile:
    """Where this process writes its stacks. `signal` is the number of the one that makes the main thread write its own.

    The handler stays for the life of the process, and the file open: a signal that comes late must find them, for without
    a handler it ends the process.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self.signal = int(signal.SIGRTMIN + 9)  # NPTL has the first ones, debuggers and runtimes tend to take the next
        path = stack_file(directory, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._file = path.open("a")  # its watcher may add to it
        faulthandler.register(self.signal, file=self._file, all_threads=False, chain=False)

    def write(self) -> None:
        """All threads' stacks, now."""
        faulthandler.dump_traceback(self._file, all_threads=True)


def forget_if_empty(directory: Path, rank: int) -> None:
    """Removes the file of a rank that nobody asked."""
    path = stack_file(directory, rank)
    if path.exists() and path.stat().st_size == 0:
        path.unlink()
        with contextlib.suppress(OSError):  # others have theirs there
            path.parent.rmdir()


def size(directory: Path, rank: int) -> int:
    """Bytes of the rank's file."""
    path = stack_file(directory, rank)
    return path.stat().st_size if path.exists() else 0


def ask(process: ProcessId, signal_number: int) -> None:
    """Asks the main thread of a live rank that has said that it listens to this signal."""
    if lives(process):
        os.kill(process.pid, signal_number)


def account_for(directory: Path, rank: int, why: str, place: Sequence[str]) -> None:
    """For a rank that cannot write its stacks: why, and where it was by its last word."""
    lines = [f"No stacks: {why}.", "Its main thread by its last word, the innermost function first:"]
    lines += [f"  {line}" for line in place] or ["  not known"]
    path = stack_file(directory, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("\n".join(lines) + "\n")
