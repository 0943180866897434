"""One job of a run, whatever SLURM says, or does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.jobs.job_record import JobFolder, SupervisorState
from launcher.jobs.submission import free_run, submit
from megamodel.train.run_directory import RunDirectory
from tests.launcher.conftest import Mega, job_record
from tests.launcher.jobs.fake_slurm import FakeSlurm

_SILENT = "exec sleep 60"
_BUSY = 'echo "slurm_load_jobs error: Socket timed out on send/recv operation" >&2; exit 1'
_LOST = """
case "$1" in
    --test-only) cat > /dev/null;;
    *) {how};;
esac
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_run, "_ASK_SECONDS", 1.0)
    monkeypatch.setattr(free_run, "_AGAIN_SECONDS", 0.1)
    monkeypatch.setattr(free_run, "TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(submit, "_SUBMIT_SECONDS", 1.0)


def ended(folder: JobFolder) -> None:
    folder.write_state(SupervisorState(state="failed", host="n1", pid=1, updated=0.0))


@pytest.mark.parametrize("queue_says", [_SILENT, _BUSY])
def test_a_job_of_which_the_queue_does_not_tell_may_still_be_there(
    mega: Mega, tiny: Path, queue: FakeSlurm, folder: JobFolder, queue_says: str
) -> None:
    folder.write_record(job_record())
    queue.program("squeue", queue_says)
    refused = mega("launch", tiny, "--on", "slurm")
    assert refused.code == 1
    assert (
        "tiny: it was job 5, which may still be in SLURM's queue, and squeue does not tell (asked for 1 s)"
        in refused.err
    )
    assert "remove runs/tiny/launch/job.json" in refused.err
    assert queue.calls("sbatch") == []
    assert [path.name for path in folder.root.iterdir()] == ["job.json"]
    ended(folder)  # as it says itself
    assert mega("launch", tiny, "--on", "slurm").code == 0


def test_a_queue_that_tells_the_second_time(mega: Mega, tiny: Path, queue: FakeSlurm, folder: JobFolder) -> None:
    folder.write_record(job_record(earlier_job_ids=("3",)))
    queue.program("squeue", f'[ -e "$FAKE/told" ] && exit 0; touch "$FAKE/told"; {_BUSY}')
    assert mega("launch", tiny, "--on", "slurm").code == 0
    kept = folder.read_record()
    assert kept is not None
    assert (kept.job_id, kept.earlier_job_ids) == ("7", ("3", "5"))


def test_where_there_is_no_queue_the_lock_alone_tells(
    folder: JobFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_record(job_record())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert free_run.check_is_free(RunDirectory(folder.root.parent)) is None


@pytest.mark.parametrize("how", [_SILENT, _BUSY])
def test_a_submission_without_an_answer_is_looked_up(
    mega: Mega, tiny: Path, queue: FakeSlurm, folder: JobFolder, how: str
) -> None:
    folder.write_record(job_record(job_id="6"))
    ended(folder)
    queue.program("sbatch", _LOST.format(how=how))
    jobs = (("6|COMPLETING", folder.script), ("8|PENDING", "/elsewhere/job.sh"), ("9|PENDING", folder.script))
    listing = " ".join(f"'{job}|None|{script}'" for job, script in jobs)
    queue.program("squeue", f'case "$*" in *--me*) printf "%s\\n" {listing};; esac')
    done = mega("launch", tiny, "--on", "slurm", "--json")
    assert done.code == 0, done.err
    assert done.json["job_id"] == "9"
    kept = folder.read_record()
    assert kept is not None
    assert kept.job_id == "9"


def test_a_job_that_may_be_queued_keeps_its_files(mega: Mega, tiny: Path, queue: FakeSlurm, folder: JobFolder) -> None:
    queue.program("sbatch", _LOST.format(how=_SILENT))
    refused = mega("launch", tiny, "--on", "slurm")
    assert refused.code == 1
    assert "sbatch has not answered for 1 s" in refused.err
    assert "Whether the job is queued is not known, so runs/tiny/launch is left for it" in refused.err
    assert folder.script.exists()
    assert folder.config.exists()
    status = mega("status", "tiny", "--json").json
    assert status["state"] == "queued"
    assert "SLURM has not confirmed the job" in mega("cancel", "tiny").err
    # Once it shows, it is known.
    queue.program("squeue", f'echo "9|PENDING|None|{folder.script}"')
    again = mega("launch", tiny, "--on", "slurm")
    assert again.code == 1
    assert "run tiny is job 9 in SLURM's queue already (PENDING)" in again.err
    kept = folder.read_record()
    assert kept is not None
    assert kept.job_id == "9"
    # And where it was never taken, the same command submits it.
    folder.write_record(job_record(job_id=None))
    queue.program("squeue", "")
    queue.program("sbatch", _LOST.format(how="echo 10"))
    assert mega("launch", tiny, "--on", "slurm", "--json").json["job_id"] == "10"
