"""What a job keeps beside its run is read back as it was written, and a damaged file ends nothing."""

import json
import os
from pathlib import Path

import pytest

from launcher.jobs.job_record import JobFolder, JobRecord, SupervisorState
from megamodel.train.run_directory import RunDirectory

STATE = SupervisorState(
    state="running", host="n1", pid=7, updated=1.0, attempt=3, hosts=("n1", "n2"), excluded_hosts={"n3": "it is slow"}
)
RECORD = JobRecord(
    backend="slurm", job_id="17", submitted=1.0, submitted_from="login", nodes=2, earlier_job_ids=("15", "16")
)


def test_what_is_written_is_read_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = JobFolder(RunDirectory(tmp_path))
    assert (folder.read_record(), folder.read_state()) == (None, None)
    folder.write_record(RECORD)
    written = folder.write_state(STATE)
    assert (folder.read_record(), folder.read_state()) == (RECORD, written)
    assert sorted(path.name for path in folder.root.iterdir()) == ["job.json", "state.json"]


@pytest.mark.parametrize(
    "content",
    ["", '{"state": "run', "[]", "null", "{}", '{"hosts": null}', '{"hosts": [], "of": "another version"}', "\x00"],
)
def test_a_damaged_file_counts_as_not_there_and_is_told(tmp_path: Path, content: str) -> None:
    said: list[str] = []
    folder = JobFolder(RunDirectory(tmp_path), say=said.append)
    folder.write_record(RECORD)
    folder.write_state(STATE)
    for name in ("job.json", "state.json"):
        (folder.root / name).write_text(content)
    assert (folder.read_record(), folder.read_state()) == (None, None)
    for name, told in zip(("job.json", "state.json"), said, strict=True):
        assert told.startswith(f"{folder.root / name} is damaged (")
        assert told.endswith("), as a crash may leave it: it counts as not there, and is written anew")
    folder.write_state(STATE)
    assert folder.read_state() is not None


def test_damage_is_told_on_stderr_unless_somebody_else_listens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = JobFolder(RunDirectory(tmp_path))
    folder.root.mkdir()
    (folder.root / "state.json").touch()
    assert folder.read_state() is None
    assert "state.json is damaged (" in capsys.readouterr().err


def test_the_content_is_on_the_disk_before_the_file_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = JobFolder(RunDirectory(tmp_path))
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def noted_sync(descriptor: int) -> None:
        partial = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert json.loads(partial.read_text())["attempt"] == 3, "all of it has left this process"
        calls.append(f"sync {partial.suffix}")
        sync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    folder.write_state(STATE)
    assert calls == ["sync .partial", "replace"]
