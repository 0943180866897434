"""`mega cancel`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.jobs.job_record import JobFolder, JobRecord, SupervisorState
from megamodel.train.run_directory import RunDirectory
from tests.launcher.conftest import Mega
from tests.launcher.jobs.fake_slurm import FakeSlurm

_SAYS_WHICH_SIGNAL = """
import signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: sys.exit(number))
print("up", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobFolder:
    """Of the run `big`, which has a configuration."""
    monkeypatch.chdir(tmp_path)
    made = JobFolder(RunDirectory(Path("runs/big")))
    made.root.mkdir(parents=True)
    made.config.touch()
    return made


def launched(folder: JobFolder, job_id: str | None = "7", backend: str = "slurm") -> None:
    folder.write_record(
        JobRecord(backend=backend, job_id=job_id, submitted=time.time(), submitted_from="x", nodes=1)  # type: ignore[arg-type]
    )


def supervised(folder: JobFolder, **changes: object) -> None:
    fields = {"state": "running", "host": socket.gethostname(), "pid": os.getpid(), "updated": 0.0}
    folder.write_state(SupervisorState(**{**fields, **changes}))  # type: ignore[arg-type]


@pytest.fixture
def supervisor(folder: JobFolder) -> Iterator[subprocess.Popen[str]]:
    """A process that looks like `mega launch --on local` of the run, and says in its state that it is its supervisor."""
    command = [sys.executable, "-c", _SAYS_WHICH_SIGNAL, "launch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        launched(folder, job_id=None, backend="local")
        supervised(folder, pid=process.pid)
        yield process
        process.kill()


def test_a_job_that_runs_saves_and_ends(mega: Mega, folder: JobFolder, fake_slurm: FakeSlurm) -> None:
    launched(folder)
    supervised(folder, host="n1")
    fake_slurm.program("squeue", 'echo "7|RUNNING|None"')
    # Who is told to stop then knows that it is for good.
    fake_slurm.program("scancel", f"[ -e {folder.root.absolute()}/cancel ]")
    ended = mega("cancel", "big", "--json")
    assert ended.code == 0, ended.err
    assert ended.json == {"run_dir": "runs/big", "job_id": "7", "action": "stops"}
    assert fake_slurm.calls("scancel") == ["scancel --signal=TERM --batch 7"]
    assert "Job 7 is asked to save and end" in mega("cancel", "runs/big").out


def test_a_job_that_must_end_now(mega: Mega, folder: JobFolder, fake_slurm: FakeSlurm) -> None:
    launched(folder)
    fake_slurm.program("squeue", 'echo "7|RUNNING|None"')
    ended = mega("cancel", "big", "--now")
    assert ended.code == 0
    assert "its last checkpoint stays" in ended.out
    assert fake_slurm.calls("scancel") == ["scancel 7"]


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_job_that_waits(mega: Mega, folder: JobFolder, fake_slurm: FakeSlurm, has_begun: bool) -> None:
    launched(folder)
    if has_begun:
        supervised(folder, state="queued", host="n1", restarts=2)
    fake_slurm.program("squeue", 'echo "7|PENDING|Resources"')
    ended = mega("cancel", "big", "--json")
    assert ended.json["action"] == "dequeued"
    assert fake_slurm.calls("scancel") == ["scancel 7"]
    state = folder.read_state()
    assert state is not None
    assert state.state == "failed"
    assert state.cause == ("cancelled while it waited" if has_begun else "cancelled before it was started")
    assert state.restarts == (2 if has_begun else 0)


def test_a_job_that_is_gone(mega: Mega, folder: JobFolder, fake_slurm: FakeSlurm) -> None:
    launched(folder)
    for answer, state in (
        ("", "running"),
        ('echo "7|COMPLETING|None"', "finished"),
        ('echo "7|COMPLETING|None"', "failed"),
    ):
        supervised(folder, state=state)
        fake_slurm.program("squeue", answer)
        ended = mega("cancel", "big")
        assert ended.code == 1
        assert "job 7 is not running any more" in ended.err
    assert not folder.is_cancelled()
    assert fake_slurm.calls("scancel") == []


@pytest.mark.parametrize("state", [None, "queued", "running"])
def test_a_job_that_ends_to_be_started_again(
    mega: Mega, folder: JobFolder, fake_slurm: FakeSlurm, state: str | None
) -> None:
    launched(folder)
    if state is not None:
        supervised(folder, state=state, cause="preempted")
    fake_slurm.program("squeue", 'echo "7|COMPLETING|None"')
    ended = mega("cancel", "big", "--json")
    assert (ended.code, ended.json["action"]) == (0, "dequeued")
    assert "Job 7 is just ending, and is not started again." in ended.err
    # A start that is under way already reads it.
    assert folder.is_cancelled()
    assert fake_slurm.calls("scancel") == ["scancel 7"]
    after = folder.read_state()
    assert after is not None
    if state == "running":  # its supervisor still lives, and says itself how it ends
        assert (after.state, after.cause) == ("running", "preempted")
    else:
        assert (after.state, after.cause) == ("failed", "cancelled before it was started again")


@pytest.mark.parametrize(
    ("said", "code"), [("Job/step already completing or completed", 0), ("Access/permission denied", 1)]
)
def test_slurm_does_not_cancel_what_ends(
    mega: Mega, folder: JobFolder, fake_slurm: FakeSlurm, said: str, code: int
) -> None:
    launched(folder)
    fake_slurm.program("squeue", 'echo "7|COMPLETING|None"')
    fake_slurm.program("scancel", f'echo "scancel: error: Kill job error on job id 7: {said}" >&2; exit 1')
    ended = mega("cancel", "big")
    assert ended.code == code
    assert (said in ended.err) is bool(code)
    assert folder.is_cancelled() is not bool(code)


def test_slurm_says_no(mega: Mega, folder: JobFolder, fake_slurm: FakeSlurm) -> None:
    launched(folder)
    fake_slurm.program("squeue", 'echo "7|RUNNING|None"')
    fake_slurm.program(
        "scancel", 'echo "scancel: error: Kill job error on job id 7: Access/permission denied" >&2; exit 1'
    )
    ended = mega("cancel", "big")
    assert ended.code == 1
    assert ended.err.endswith("scancel --signal=TERM --batch 7: Kill job error on job id 7: Access/permission denied\n")
    # The job goes on: it must not take its next preemption for the end.
    assert not folder.is_cancelled()
    folder.ask_to_cancel()
    mega("cancel", "big")
    assert folder.is_cancelled()  # somebody else's word stands


def test_what_slurm_may_have_heard_stands(mega: Mega, folder: JobFolder, fake_slurm: FakeSlurm) -> None:
    launched(folder)
    fake_slurm.program("squeue", 'echo "7|RUNNING|None"')
    fake_slurm.program("scancel", 'echo "scancel: error: Socket timed out on send/recv operation" >&2; exit 1')
    ended = mega("cancel", "big")
    assert ended.code == 1
    assert "Socket timed out on send/recv operation; SLURM may have heard it, so the run stays marked" in ended.err
    assert folder.is_cancelled()


def test_no_queue_here(mega: Mega, folder: JobFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    launched(folder)
    ended = mega("cancel", "big")
    assert ended.code == 1
    assert "run this where jobs are submitted" in ended.err


def test_a_supervisor_of_this_host_saves_and_ends(
    mega: Mega, folder: JobFolder, supervisor: subprocess.Popen[str]
) -> None:
    ended = mega("cancel", "big", "--json")
    assert ended.json == {"run_dir": "runs/big", "job_id": None, "action": "stops"}
    assert supervisor.wait(timeout=30) == signal.SIGTERM
    assert folder.is_cancelled()
    again = mega("cancel", "big")
    assert again.code == 1
    assert f"its supervisor, process {supervisor.pid} on this host, is gone" in again.err


def test_a_supervisor_of_this_host_that_must_end_now(
    mega: Mega, folder: JobFolder, supervisor: subprocess.Popen[str]
) -> None:
    assert mega("cancel", "big", "--now").code == 0
    assert supervisor.wait(timeout=30) == -signal.SIGKILL
    state = folder.read_state()
    assert state is not None
    assert (state.state, state.cause) == ("failed", "cancelled at once")


@pytest.mark.parametrize(("backend", "end"), [("torchrun", "75"), ("local", None)])
def test_who_takes_part_in_a_job_that_must_end_now_is_told(
    mega: Mega, folder: JobFolder, supervisor: subprocess.Popen[str], backend: str, end: str | None
) -> None:
    launched(folder, job_id=None, backend=backend)
    assert mega("cancel", "big", "--now").code == 0
    assert supervisor.wait(timeout=30) == -signal.SIGKILL
    assert (folder.end.read_text().strip() if folder.end.exists() else None) == end


def test_somebody_elses_process_is_left_alone(mega: Mega, folder: JobFolder) -> None:
    launched(folder, job_id=None, backend="local")
    with subprocess.Popen(["sleep", "1000"]) as other:
        supervised(folder, pid=other.pid)
        ended = mega("cancel", "big")
        assert ended.code == 1
        assert "is gone: there is nothing to cancel" in ended.err
        assert other.poll() is None
        other.kill()


def test_a_number_that_another_supervisor_has_now(
    mega: Mega, folder: JobFolder, supervisor: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.jobs.job_record.time.time", lambda: 1000.0)  # long before that process began
    supervised(folder, pid=supervisor.pid)
    assert mega("cancel", "big").code == 1
    assert supervisor.poll() is None


def test_a_supervisor_of_another_host(mega: Mega, folder: JobFolder) -> None:
    launched(folder, job_id=None, backend="mpi")
    supervised(folder, host="login2", pid=77)
    ended = mega("cancel", "big")
    assert ended.code == 1
    assert "its supervisor is process 77 on login2: run `mega cancel` there" in ended.err


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_a_job_that_has_ended(mega: Mega, folder: JobFolder, state: str) -> None:
    launched(folder, job_id=None, backend="local")
    assert "has not begun: there is nothing to cancel" in mega("cancel", "big").err
    supervised(folder, state=state)
    ended = mega("cancel", "big")
    assert ended.code == 1
    assert f"has ended ({state}): there is nothing to cancel" in ended.err


def test_no_such_run_and_none_of_ours(mega: Mega, folder: JobFolder) -> None:
    ended = mega("cancel", "bigg")
    assert ended.code == 1
    assert "there is no such run; did you mean runs/big?" in ended.err
    ended = mega("cancel", "big")
    assert ended.code == 1
    assert "was not started by `mega launch`; Ctrl-C or SIGTERM" in ended.err
