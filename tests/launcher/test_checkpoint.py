"""`mega checkpoint verify`: what is corrupt, what only cannot be read, and what a live run has removed meanwhile.
`mega checkpoint reshard`: a copy in few files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from parallel.checkpoint.directory import MANIFEST, CheckpointDirectory, CheckpointInfo, record_file
from parallel.checkpoint.store import CheckpointStore
from parallel.checkpoint.transfer import WholeEntries
from parallel.placement import Piece
from parallel.world import World
from tests.gloo_pool import GlooPool
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


@pytest.fixture
def of_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gloo_ranks: GlooPool) -> CheckpointInfo:
    """A run with one checkpoint, of tensors in two parts and an object."""
    monkeypatch.chdir(tmp_path)
    _RUN.mkdir(parents=True)
    (_RUN / "config.toml").touch()
    gloo_ranks(2, save_halves, tmp_path / _RUN / "checkpoints")
    return CheckpointDirectory(_RUN / "checkpoints").list()[-1]


def save_halves(world: World, root: Path) -> None:
    half = Piece(local=torch.full((2, 3), float(world.rank)), shape=torch.Size((4, 3)), offsets=(2 * world.rank, 0))
    with CheckpointStore(root, world) as store:
        state = {"w": half, "v": half, "step": torch.tensor(7.0), "note": ["plain", 1]}
        store.save(4, state, metadata={"of": "the run"}, asynchronous=False)


def test_a_copy_in_few_files_holds_the_same(of_two_ranks: CheckpointInfo, mega: Mega, tmp_path: Path) -> None:
    ended = mega("checkpoint", "reshard", _RUN, "--to", tmp_path / "copy", "--files", "2", "--json")
    assert (ended.code, ended.json["step"], ended.json["metadata"]) == (0, 4, {"of": "the run"})
    (copy,) = CheckpointDirectory(tmp_path / "copy").list()
    CheckpointDirectory(tmp_path / "copy").verify(copy)
    assert sorted(copy.manifest.files) == [".metadata", "__0_0.distcp", "__0_1.distcp"]
    assert copy.manifest.world_size == 2
    before, after = WholeEntries(of_two_ranks.path), WholeEntries(copy.path)
    assert set(before) == set(after) == {"w", "v", "step", "note"}
    assert after["w"].tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
    assert all(torch.equal(before[key], after[key]) for key in ("w", "v", "step"))
    assert after["note"] == ["plain", 1]
    assert len(FileSystemReader(copy.path).read_metadata().state_dict_metadata["w"].chunks) == 1

    again = mega("checkpoint", "reshard", _RUN, "--to", tmp_path / "copy")
    assert again.code == 1
    assert f"{copy.path} is there already; copy to another folder, or remove it" in again.err


def test_what_cannot_be_copied_is_refused(
    of_two_ranks: CheckpointInfo, mega: Mega, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = mega("checkpoint", "reshard", _RUN, "--to", tmp_path / "copy", "--step", "5")
    assert ended.code == 1
    assert "there is no complete checkpoint of step 5 to copy" in ended.err

    def full_disk(self: Any, *args: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("torch.distributed.checkpoint.FileSystemWriter.write_data", full_disk)
        ended = mega("checkpoint", "reshard", _RUN, "--to", tmp_path / "copy")
    assert ended.code == 1
    assert "was not copied" in ended.err
    assert "No space left on device" in ended.err
    assert list((tmp_path / "copy").iterdir()) == []

    victim = of_two_ranks.path / "__0_0.distcp"
    victim.write_bytes(victim.read_bytes()[:-1])
    ended = mega("checkpoint", "reshard", _RUN, "--to", tmp_path / "copy")
    assert ended.code == 3
    assert "is corrupt: __0_0.distcp has" in ended.err
