"""One start of a run at a time: two would write over each other's checkpoints and metrics."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launcher.errors import ConfigError, RunError

LOCK_NAME = ".lock"
_LOOKS, _LOOK_AGAIN_S = 5, 0.02


@contextlib.contextmanager
def locked_run(root: Path, *, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the run in the folder `root`, which is made if need be. The system lets go of it when this process dies.

    Those who only read a run do not ask for it. `say` hears of a file system that knows no locks.
    Raises RunError, naming who holds it, where the run is held already; ConfigError where the folder cannot be made.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ConfigError(
            f"run.directory: {root} cannot be made or written ({error.strerror}); set run.directory to a folder that you may "
            "write"
        ) from error
    try:
        try:
            _lock(descriptor)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
            raise RunError(f"run {root.name} is being trained by {holder}; stop it, or set run.name") from None
        except OSError as error:
            say(f"{root / LOCK_NAME}: this file system has no locks ({error.strerror}); start no run twice at a time")
            yield
            return
        try:
            with contextlib.suppress(OSError):  # a full disk: the name is a courtesy, the lock is held without it
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            yield
        finally:
            # Not by closing alone, which leaves it with any process that was forked in between.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def is_held(root: Path) -> bool | None:
    """Whether some process holds the run in the folder `root`; None where this file system cannot tell.

    Looking takes the lock for an instant, which `locked_run` allows for.
    """
    try:
        descriptor = os.open(root / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: those who look do not see one another
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def _lock(descriptor: int) -> None:
    """Raises BlockingIOError where somebody holds it, and is not only looking."""
    for look in range(_LOOKS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if look == _LOOKS - 1:
                raise
            time.sleep(_LOOK_AGAIN_S)
