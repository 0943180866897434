"""`mega launch --on slurm`: what needs no job, what the job needs, and what SLURM refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from launcher.jobs.job_record import JobFolder
from tests.launcher.conftest import Mega
from tests.launcher.jobs.fake_slurm import FakeSlurm

_REFUSES = 'cat > /dev/null; echo "allocation failure: Requested node configuration is not available" >&2; exit 1'


def _saved(folder: JobFolder, step: int) -> None:
    """A complete checkpoint of the run."""
    path = folder.root.parent / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    manifest = {"version": 1, "step": step, "world_size": 1, "saved_at": 1.0, "metadata": {}, "files": {}}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("steps", [4, 2])
def test_a_finished_run_is_not_queued_again(
    mega: Mega, tiny: Path, queue: FakeSlurm, folder: JobFolder, steps: int
) -> None:
    _saved(folder, 4)
    again = ("launch", tiny, "--on", "slurm", "--set", "export.format=none", "--set", f"train.steps={steps}")
    ended = mega(*again)
    assert (ended.code, queue.calls("sbatch")) == (0, [])
    assert f"Nothing to do: this run is at step 4, and train.steps = {steps}" in ended.out
    assert not folder.root.exists()
    assert mega(*again, "--json").json == {"run_dir": "runs/tiny", "job_id": None, "step": 4, "finished": True}
    assert "Nothing to do" in mega(*again, "--dry-run").out


@pytest.mark.parametrize("setting", ["train.steps=5", "export.format=hf"])
def test_a_finished_run_that_is_to_do_more_is_queued(
    mega: Mega, tiny: Path, queue: FakeSlurm, folder: JobFolder, setting: str
) -> None:
    _saved(folder, 4)
    ended = mega("launch", tiny, "--on", "slurm", "--set", "export.format=none", "--set", setting)
    assert ended.code == 0, ended.err
    assert len(queue.calls("sbatch --parsable") or queue.calls("sbatch")) == 2


def test_programs_that_the_supervisor_lacks_are_named_before_the_queue(
    mega: Mega, tiny: Path, queue: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sinfo", "scontrol"):
        (queue.folder / name).unlink()
    monkeypatch.setenv("PATH", str(queue.folder))
    for more in ((), ("--dry-run",)):
        ended = mega("launch", tiny, "--on", "slurm", *more)
        assert ended.code == 2
        assert "scontrol, which tells the job's hosts, and queues it again, sinfo, which tells which hosts" in ended.err
        assert "srun" not in ended.err
    assert queue.calls("sbatch") == []
    ended = mega("launch", tiny, "--on", "slurm", "--dry-run", "--set", 'slurm.setup_lines=["module load slurm"]')
    assert ended.code == 0, ended.err
    assert "slurm.setup_lines must bring them" in ended.err


def test_a_refusal_names_the_keys_that_ask(mega: Mega, tiny: Path, queue: FakeSlurm) -> None:
    queue.program("sbatch", _REFUSES)
    asks = ("--set", "slurm.gpus=8", "--set", "train.global_batch_size=8", "--set", "slurm.constraint=fast")
    ended = mega("launch", tiny, "--on", "slurm", *asks)
    assert ended.code == 2
    assert "Requested node configuration is not available; it is asked for launch.nodes = 1" in ended.err
    assert 'launch.ranks_per_node = 8, slurm.gpus = 8, slurm.constraint = "fast"; change what' in ended.err
    assert "slurm.partition" not in ended.err


def test_the_example_with_gpus_of_the_docs(mega: Mega, tiny: Path, queue: FakeSlurm) -> None:
    root = Path(__file__).parent.parent.parent
    (command,) = re.findall(
        r"^mega (launch .*slurm\.gpus=8.*)$", (root / "docs" / "launching.md").read_text(), re.MULTILINE
    )
    Path("configs").symlink_to(root / "configs")
    shown = mega(*command.split(), "--json")
    assert shown.code == 0, shown.err
    assert (shown.json["nodes"], shown.json["ranks"]) == (2, 16)
    assert "#SBATCH --gpus-per-node=8\n" in shown.json["script"]


def test_a_dry_run_shows_the_script_that_is_refused(mega: Mega, tiny: Path, queue: FakeSlurm) -> None:
    queue.program("sbatch", _REFUSES)
    shown = mega("launch", tiny, "--on", "slurm", "--dry-run")
    assert shown.code == 2
    assert "#SBATCH --job-name=mega-tiny" in shown.out
    assert "SLURM would not take this job: allocation failure" in shown.err
    answer = mega("launch", tiny, "--on", "slurm", "--dry-run", "--json")
    assert (answer.code, "#SBATCH" in answer.json["script"]) == (2, True)
    assert answer.json["error"].startswith("SLURM would not take this job: ")


def test_a_time_that_is_none_is_told_in_words(mega: Mega, tiny: Path, queue: FakeSlurm) -> None:
    ended = mega("launch", tiny, "--on", "slurm", "--set", "slurm.time=banana", "--set", "slurm.memory=much")
    assert 'slurm.time = "banana": must be minutes, HH:MM:SS or D-HH:MM:SS\n' in ended.err
    assert 'slurm.memory = "much": must be a number, in megabytes or with K, M, G or T, such as 512G\n' in ended.err
