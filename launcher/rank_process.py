"""The beginning and the end of a process that is one rank of a run.

`enter()` must be the first thing that such a process does. One that this system has started came into the world with the
stop signals blocked, so that none is lost before there is a handler.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from launcher.parent_tie import die_with_parent, tie_to_launcher

SUPERVISOR_PID = "MEGA_SUPERVISOR_PID"
FAILURE_FILE = "MEGA_FAILURE_FILE"
EXIT_STOPPED = 75
"""Stopped early, with all that was trained saved."""
EXIT_INTERRUPTED = 130
"""Ended by a second Ctrl-C, without saving: 128 + SIGINT, as shells have it."""


def stop_signals() -> frozenset[signal.Signals]:
    """The signals that ask a run to save and stop. A hang-up that `nohup` has silenced stays silent."""
    asked = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    return frozenset(asked if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else asked | {signal.SIGHUP})


def failure_file(environ: Mapping[str, str]) -> Path | None:
    """Where this process leaves the reason of its failure, when a local launcher started it; else None."""
    return Path(environ[FAILURE_FILE]) if FAILURE_FILE in environ else None


def enter(environ: Mapping[str, str]) -> None:
    """Ties this process to its launcher, and handles stop signals until the trainer does. Else does nothing.

    The kernel kills this process when the launcher dies, however it dies. A stop signal before the first step has
    nothing to save: the process ends with 75 at once. A rank that another launcher has started is tied to it too.
    """
    if SUPERVISOR_PID not in environ:
        tie_to_launcher(environ)
        return
    die_with_parent(int(environ[SUPERVISOR_PID]))
    stop_before_first_step()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())


def stop_before_first_step() -> None:
    """Installs handlers that end this process with 75; the trainer puts its own, which save, in their place.

    They are in force before the first step and, again, once all that was trained is saved: 75 never means a loss.
    A hang-up counts as SIGTERM, so that losing the terminal saves too.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(EXIT_STOPPED)

    def hang_up(number: int, frame: FrameType | None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    for number in stop_signals():
        signal.signal(number, hang_up if number == signal.SIGHUP else stop)


def leave(environ: Mapping[str, str], code: int) -> None:
    """Ends a rank at once, with all that it wrote flushed; does nothing in a process that is no rank.

    Everything is saved and closed by then. What the interpreter's own end would add is the destruction of torch's C++
    threads, and with gloo that aborts now and then ("terminate called without an active exception", torch 2.13).
    """
    if "RANK" not in environ:
        return
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
