"""`mega supervise`: what the batch script becomes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.jobs.job_record import JobFolder
from launcher.output import Output
from launcher.run_lock import locked_run
from launcher.verbs import supervise
from tests.launcher.conftest import Mega, job_record
from tests.launcher.jobs.fake_slurm import FakeSlurm


def test_what_the_batch_script_becomes_needs_a_job(mega: Mega, tiny: Path, queue: FakeSlurm) -> None:
    assert mega("launch", tiny, "--on", "slurm").code == 0
    ended = mega("supervise", "runs/tiny")
    assert ended.code == 2
    assert "SLURM_JOB_ID is not set" in ended.err


def test_the_supervisor_knows_its_job(
    mega: Mega, tiny: Path, queue: FakeSlurm, folder: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may begin before `mega launch` has heard the job's number; and anybody may submit the script again."""
    folder.write_record(job_record(job_id=None, submitted=1000.0))
    said: list[str] = []
    supervise._note_job(folder, "8", said.append)
    kept = folder.read_record()
    assert kept is not None
    assert (kept.job_id, kept.submitted, kept.earlier_job_ids) == ("8", 1000.0, ())
    began = time.time()
    supervise._note_job(folder, "9", said.append)
    supervise._note_job(folder, "9", said.append)
    kept = folder.read_record()
    assert kept is not None
    assert (kept.job_id, kept.earlier_job_ids) == ("9", ("8",))
    assert kept.submitted >= began  # not that of job 8
    folder.forget_record()
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    supervise._note_job(folder, "9", said.append)
    kept = folder.read_record()
    assert kept is not None
    assert (kept.job_id, kept.nodes) == ("9", 4)
    assert said == []


def test_a_full_disk_that_does_not_take_the_job_ends_nothing(
    folder: JobFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.write_record(job_record(job_id="8"))
    (folder.root / f"job.{os.getpid()}.partial").symlink_to("/dev/full")
    supervise._note_job(folder, "9", partial(supervise._say, Output(as_json=False).warn))
    kept = folder.read_record()
    assert kept is not None
    assert kept.job_id == "8"
    told = capsys.readouterr().err
    assert "that this is job 9 cannot be written now ([Errno 28] No space left on device); it goes on\n" in told


def test_a_start_waits_for_the_one_before(
    mega: Mega, tiny: Path, queue: FakeSlurm, folder: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mega("launch", tiny, "--on", "slurm").code == 0
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(supervise, "_LOCK_SECONDS", -1.0)
    with locked_run(folder.root.parent, say=print):
        ended = mega("supervise", "runs/tiny")
    assert ended.code == 1
    assert "is being trained by pid" in ended.err

    class WaitsError(Exception):
        """It would wait."""

    def sleep(seconds: float) -> None:
        raise WaitsError

    said: list[str] = []
    monkeypatch.setattr(supervise, "_LOCK_SECONDS", 1000.0)
    monkeypatch.setattr(supervise, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    lock = supervise._locked(folder.root.parent, said.append)
    with locked_run(folder.root.parent, say=print), pytest.raises(WaitsError), lock:
        pass
    assert said[0].startswith("waiting: run tiny is being trained by pid")
    with supervise._locked(folder.root.parent, said.append):
        assert len(said) == 1


@contextlib.contextmanager
def waiting_supervisor(folder: JobFolder) -> Iterator[subprocess.Popen[str]]:
    """`mega supervise` of job 7, which waits until this process lets go of the run: at the end."""
    environ = {**os.environ, "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launcher", "supervise", str(folder.root.parent)]
    with locked_run(folder.root.parent, say=print):
        process = subprocess.Popen(
            command,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder.root.parents[2],
        )
        try:
            assert process.stdout is not None
            assert "waiting: run tiny is being trained by" in process.stdout.readline()
            yield process
        except BaseException:
            process.kill()
            process.wait()
            raise


def test_a_warning_that_comes_before_the_supervisor_listens(
    mega: Mega, tiny: Path, queue: FakeSlurm, folder: JobFolder
) -> None:
    assert mega("launch", tiny, "--on", "slurm").code == 0
    queue.job(NodeList="n1")
    queue.program("sinfo", 'echo "n1|mixed"')
    with waiting_supervisor(folder) as process:
        process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert "the job is queued again" in out
    assert queue.calls("scontrol")[-1] == "scontrol requeue 7"
    assert queue.calls("srun") == []
    after = folder.read_state()
    assert after is not None
    assert (after.state, after.requeues) == ("queued", 1)


def test_a_supervisor_that_is_told_to_end_while_it_waits_for_the_run(
    mega: Mega, tiny: Path, queue: FakeSlurm, folder: JobFolder
) -> None:
    assert mega("launch", tiny, "--on", "slurm").code == 0
    with waiting_supervisor(folder) as process:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 1, out
    assert "told to end by SIGTERM while waiting for the run" in out


def test_a_full_disk_does_not_end_the_supervisor() -> None:
    full = Path("/dev/full").open("w")  # noqa: SIM115 - to close it fails too
    try:
        supervise._say(Output(as_json=False, out=full).say, "attempt 1")
    finally:
        with contextlib.suppress(OSError):
            full.close()
