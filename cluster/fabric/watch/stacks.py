"""Python stacks of a rank on demand: written by a signal's handler in C, whatever holds the interpreter.

The rank says which signal it listens to (`listen`), its watcher sends that (`ask`). A process that cannot answer, being
stopped or gone, gets an account of what the kernel still knows (`account_for`).
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


def listen(directory: Path, rank: int) -> int:
    """Makes this process write the stacks of all its threads on a signal, and returns the signal's number.

    The handler stays for the life of the process, and its file open: a signal that comes late must find it, for without
    it the signal ends the process.
    """
    number = signal.SIGRTMIN + 9  # NPTL has the first ones, debuggers and runtimes tend to take the next
    path = stack_file(directory, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    file = path.open("a")  # its watcher may add to it
    faulthandler.register(number, file=file, all_threads=True, chain=False)
    return int(number)


def forget_if_empty(directory: Path, rank: int) -> None:
    """Removes the file of a rank that nobody asked."""
    path = stack_file(directory, rank)
    if path.exists() and path.stat().st_size == 0:
        path.unlink()
        with contextlib.suppress(OSError):  # others have theirs there
            path.parent.rmdir()


def ask(process: ProcessId, signal_number: int) -> None:
    """Asks a live rank that has said that it listens to this signal."""
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
