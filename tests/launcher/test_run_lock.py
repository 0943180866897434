"""Nobody trains a run that somebody else trains."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import ConfigError, RunError
from launcher.run_lock import LOCK_NAME, is_held, locked_run
from tests.launcher.conftest import Mega

_HOLDER = """
import sys
from pathlib import Path
from launcher.run_lock import locked_run
with locked_run(Path(sys.argv[1]), say=print):
    print("held", flush=True)
    sys.stdin.read()
"""


def refuse(message: str) -> None:
    raise AssertionError(message)


def test_a_folder_that_cannot_be_made_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = tmp_path / "file" / "x"
    said = f"run.directory: {run} cannot be made or written (Not a directory); set run.directory to a folder"
    with pytest.raises(ConfigError, match=re.escape(said)), locked_run(run, say=refuse):
        pass


def test_a_run_is_held_once_and_let_go_of(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    held_by = f"pid {os.getpid()} on {socket.gethostname()}"
    with locked_run(run, say=refuse):
        with (
            pytest.raises(RunError, match=f"^run x is being trained by {held_by}; stop it, or set run.name$"),
            locked_run(run, say=refuse),
        ):
            pass
        with locked_run(tmp_path / "runs" / "y", say=refuse):
            pass
    with locked_run(run, say=refuse):
        pass


def test_a_failed_start_lets_go_though_a_forked_process_has_the_file_open(tmp_path: Path) -> None:
    copies: list[int] = []

    def fork_and_fail() -> None:
        lock = tmp_path / "x" / ".lock"
        (held,) = [entry for entry in list(Path("/proc/self/fd").iterdir()) if os.path.realpath(entry) == str(lock)]
        copies.append(os.dup(int(held.name)))  # as a fork leaves it
        raise KeyError

    with pytest.raises(KeyError), locked_run(tmp_path / "x", say=refuse):
        fork_and_fail()
    with locked_run(tmp_path / "x", say=refuse):
        pass
    os.close(copies[0])


@pytest.mark.parametrize("ends_by", [signal.SIGKILL, signal.SIGTERM])
def test_the_system_lets_go_of_a_dead_process_run(tmp_path: Path, ends_by: signal.Signals) -> None:
    command = [sys.executable, "-c", _HOLDER, str(tmp_path / "x")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"by pid {holder.pid} on "), locked_run(tmp_path / "x", say=refuse):
            pass
        holder.send_signal(ends_by)
        holder.wait(timeout=60)
    with locked_run(tmp_path / "x", say=refuse):
        pass


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    said: list[str] = []
    with locked_run(tmp_path / "x", say=said.append):
        pass
    assert said == [
        f"{tmp_path / 'x' / '.lock'}: this file system has no locks (No locks available); start no run twice at a time"
    ]


@pytest.mark.parametrize("call", ["ftruncate", "pwrite"])
def test_a_full_disk_takes_the_holders_name_and_not_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(descriptor: int, *rest: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with locked_run(tmp_path / "x", say=refuse):
        assert is_held(tmp_path / "x") is True
        with (
            pytest.raises(RunError, match=r"^run x is being trained by another process; "),
            locked_run(tmp_path / "x", say=refuse),
        ):
            pass


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_run_that_is_being_trained_is_not_started_again(tiny: Path, mega: Mega, ranks: str) -> None:
    run = Path("runs/tiny")
    with locked_run(run, say=refuse):
        ended = mega("train", tiny, "--ranks", ranks, "--json")
        assert ended.code == 1
        assert ended.json["error"].startswith(f"run tiny is being trained by pid {os.getpid()} on ")
        assert sorted(path.name for path in run.iterdir()) == [".lock"]
        assert mega("train", tiny, "--dry-run").code == 0


def test_looking_tells_whether_a_run_is_held_and_changes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "x"
    assert is_held(run) is False
    assert not run.exists()
    with locked_run(run, say=refuse):
        assert is_held(run) is True
        holder = (run / LOCK_NAME).read_text()
    assert is_held(run) is False
    assert (run / LOCK_NAME).read_text() == holder


def test_a_start_is_not_refused_because_somebody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "x"
    run.mkdir()
    (run / LOCK_NAME).touch()
    look = os.open(run / LOCK_NAME, os.O_RDONLY)
    fcntl.flock(look, fcntl.LOCK_SH)
    assert is_held(run) is False  # nor do two who look see one another
    monkeypatch.setattr("time.sleep", lambda seconds: fcntl.flock(look, fcntl.LOCK_UN))
    with locked_run(run, say=refuse):
        assert is_held(run) is True
    os.close(look)


def test_a_file_system_without_locks_cannot_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / LOCK_NAME).touch()
    monkeypatch.setattr("fcntl.flock", no_locks)
    assert is_held(tmp_path) is None
