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

from launcher.errors import RunError
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
    queue.job(NodeList="n1")
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now, strftime=time.strftime)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        clock.now += seconds

    clock.sleep = sleep
    monkeypatch.setattr(supervise, "time", clock)
    with locked_run(folder.root.parent, say=print):
        ended = mega("supervise", "runs/tiny")
    # launch.wait_for_hosts_seconds, and the scheduler's ten minutes, of the supervisor before it.
    assert sum(waited) > 300 + 600
    lines = [line for line in ended.err.splitlines() + ended.out.splitlines() if "is being trained by pid" in line]
    assert "waiting up to 1095 s, as long as a supervisor whose host is lost may go on: run tiny is" in lines[0]
    assert 10 < len(lines) < 30
    assert (ended.code, lines[-1].endswith("the job is queued again")) == (75, True)
    assert queue.calls("scontrol")[-1] == "scontrol requeue 7"
    assert folder.read_state() is None  # that is the other supervisor's


@pytest.mark.parametrize("answer", ["no", "none"])
def test_a_start_that_waits_in_vain_ends_where_it_is_not_queued_again(folder: JobFolder, answer: str) -> None:
    run, said, asked = folder.root.parent, [], []

    def requeue() -> bool:
        asked.append(answer)
        if answer == "none" and len(asked) < 3:
            raise RunError("slurmctld: timed out")
        return False

    hold = partial(supervise._hold, run, say=said.append, patience_s=0.0, requeue=requeue)
    with locked_run(run, say=print), contextlib.ExitStack() as held, pytest.raises(RunError, match="is being trained"):
        hold(held)
    assert len(asked) == (3 if answer == "none" else 1)
    assert [line.startswith("slurmctld: timed out; still waiting: run tiny is") for line in said] == [True] * (
        len(asked) - 1
    )
    with contextlib.ExitStack() as held:
        assert hold(held)


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
            assert ": run tiny is being trained by" in process.stdout.readline()
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
