"""`mega checkpoint verify`: what is corrupt, what only cannot be read, and what a live run has removed meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from parallel.checkpoint.directory import MANIFEST, CheckpointDirectory, CheckpointInfo, record_file
from tests.launcher.conftest import Mega

_RUN = Path("runs/x")


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[CheckpointInfo]:
    """A run with checkpoints of steps 2 and 4."""
    monkeypatch.chdir(tmp_path)
    _RUN.mkdir(parents=True)
    (_RUN / "config.toml").touch()
    directory = CheckpointDirectory(_RUN / "checkpoints")
    infos = []
    for step in (2, 4):
        file = directory.begin(step) / "weights"
        file.write_text(f"weights of step {step}")
        infos.append(directory.commit(step, world_size=1, metadata={}, files={file.name: record_file(file)}))
    return infos


def test_all_good(saved: list[CheckpointInfo], mega: Mega) -> None:
    ended = mega("checkpoint", "verify", _RUN)
    assert (ended.code, ended.out) == (0, "".join(f"{info.path}: good\n" for info in saved))


def test_what_cannot_be_read_is_not_called_corrupt(saved: list[CheckpointInfo], mega: Mega) -> None:
    manifest = saved[1].path / MANIFEST
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
    ended = mega("checkpoint", "verify", _RUN)
    assert ended.code == 1
    assert f"{saved[1].path}: cannot be read: checkpoint {saved[1].path}: its manifest is of version 2" in ended.out
    assert "CORRUPT" not in ended.out
    assert "passes over" not in ended.out
    told = mega("checkpoint", "verify", _RUN, "--json")
    assert (told.code, told.json["ok"]) == (1, False)
    assert [checkpoint["good"] for checkpoint in told.json["checkpoints"]] == [True, None]

    (saved[0].path / MANIFEST).unlink()
    both = mega("checkpoint", "verify", _RUN)
    assert both.code == 3
    assert f"{saved[0].path}: CORRUPT: checkpoint {saved[0].path}: manifest.json is missing" in both.out


def test_what_a_live_run_removes_meanwhile_is_passed_over(
    saved: list[CheckpointInfo], mega: Mega, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = CheckpointDirectory.read

    def read_after_pruning(self: CheckpointDirectory, path: Path) -> CheckpointInfo:
        shutil.rmtree(saved[0].path, ignore_errors=True)
        return read(self, path)

    monkeypatch.setattr(CheckpointDirectory, "read", read_after_pruning)
    ended = mega("checkpoint", "verify", _RUN)
    assert (ended.code, ended.out) == (0, f"{saved[1].path}: good\n")
