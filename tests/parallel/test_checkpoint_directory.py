"""What is on disk: complete or not there at all, whatever the instant of a kill."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parallel.checkpoint.directory import CheckpointDirectory, CheckpointInfo, find_problems, record_file
from parallel.errors import CheckpointError, CorruptCheckpointError


def save(directory: CheckpointDirectory, step: int, content: bytes = b"weights") -> CheckpointInfo:
    partial = directory.begin(step)
    (partial / "__0_0.distcp").write_bytes(content)
    files = {"__0_0.distcp": record_file(partial / "__0_0.distcp")}
    return directory.commit(step, world_size=1, metadata={"samples": 8 * step}, files=files)


def corrupt(info: CheckpointInfo) -> None:
    (info.path / "__0_0.distcp").write_bytes(b"weightz")


def steps(directory: CheckpointDirectory) -> list[int]:
    return [info.step for info in directory.list()]


@pytest.fixture
def directory(tmp_path: Path) -> CheckpointDirectory:
    return CheckpointDirectory(tmp_path / "checkpoints")


def test_a_committed_checkpoint_reads_back(directory: CheckpointDirectory) -> None:
    assert directory.list() == ()
    info = save(directory, 100)
    assert info.path == directory.root / "step-00000100"
    assert directory.list() == (info,)
    assert info.manifest.metadata == {"samples": 800}
    assert info.num_bytes == len(b"weights")
    assert os.readlink(directory.root / "latest") == "step-00000100"
    directory.verify(info)


def test_steps_are_in_order_of_number_not_of_name(directory: CheckpointDirectory) -> None:
    for step in (99_999_999, 100_000_000, 2):
        save(directory, step)
    assert steps(directory) == [2, 99_999_999, 100_000_000]
    assert os.readlink(directory.root / "latest") == "step-100000000"


def test_every_kind_of_damage_is_named(directory: CheckpointDirectory) -> None:
    info = save(directory, 1)
    data = info.path / "__0_0.distcp"
    for damage, expected in (
        (lambda: data.write_bytes(b"weightz"), "the content of __0_0.distcp has changed"),
        (lambda: data.write_bytes(b"weigh"), "__0_0.distcp has 5 bytes instead of 7"),
        (data.unlink, "__0_0.distcp is missing"),
    ):
        damage()
        with pytest.raises(CorruptCheckpointError) as caught:
            directory.verify(info)
        assert expected in str(caught.value)
        assert str(info.path) in str(caught.value)
        assert caught.value.exit_code == 3


@pytest.mark.parametrize("content", ["", "{", '{"step": 1}', None])
def test_an_unreadable_manifest_is_named(directory: CheckpointDirectory, content: str | None) -> None:
    info = save(directory, 1)
    manifest = info.path / "manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    with pytest.raises(
        CorruptCheckpointError, match=r"step-00000001: manifest\.json is (missing|damaged); .*an earlier one"
    ):
        directory.read(info.path)
    assert directory.list() == ()
    assert directory.step_paths() == (info.path,)


def test_a_renamed_checkpoint_does_not_pass_for_another_step(directory: CheckpointDirectory) -> None:
    moved = save(directory, 1).path.rename(directory.root / "step-00000002")
    with pytest.raises(CorruptCheckpointError, match="its manifest is of step 1"):
        directory.read(moved)


def test_parts_together_check_every_file_once(directory: CheckpointDirectory) -> None:
    partial = directory.begin(1)
    for index in range(5):
        (partial / f"__{index}_0.distcp").write_bytes(bytes([index]))
    files = {path.name: record_file(path) for path in partial.iterdir()}
    info = directory.commit(1, world_size=5, metadata={}, files=files)
    for name in files:
        (info.path / name).write_bytes(b"?")
    found = [find_problems(info, part=part, num_parts=3) for part in range(3)]
    assert [len(part) for part in found] == [2, 2, 1]
    assert sorted(problem for part in found for problem in part) == sorted(find_problems(info))


def test_files_that_no_rank_reported_stop_the_commit(directory: CheckpointDirectory) -> None:
    (directory.begin(1) / "__1_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match="all ranks must write to one shared file system"):
        directory.commit(1, world_size=2, metadata={}, files={})
    assert steps(directory) == []


def test_saving_a_step_again_replaces_it(directory: CheckpointDirectory) -> None:
    corrupt(save(directory, 1))
    directory.verify(save(directory, 1, b"newer"))
    assert sorted(path.name for path in directory.root.iterdir()) == ["latest", "step-00000001"]


def test_a_replacement_cut_short_gives_the_old_one_back(directory: CheckpointDirectory) -> None:
    info = save(directory, 1)
    info.path.rename(directory.root / ".replaced-step-00000001")
    directory.begin(1)
    assert [path.name for path in directory.clean_up()] == [".partial-step-00000001"]
    assert directory.list() == (info,)
    assert os.readlink(directory.root / "latest") == "step-00000001"


def test_prune_keeps_the_newest(directory: CheckpointDirectory) -> None:
    for step in range(1, 6):
        save(directory, step)
    assert [path.name for path in directory.prune(2)] == ["step-00000003", "step-00000002", "step-00000001"]
    assert steps(directory) == [4, 5]
    assert directory.prune(2) == ()
    with pytest.raises(ValueError, match="at least 1"):
        directory.prune(0)


def test_prune_never_removes_the_last_good_one(directory: CheckpointDirectory) -> None:
    infos = [save(directory, step) for step in range(1, 6)]
    for info in infos[2:]:
        corrupt(info)
    directory.prune(2)
    assert steps(directory) == [2, 4, 5]  # 2 is the newest good one
    corrupt(infos[1])
    assert directory.prune(1) == ()
    assert steps(directory) == [2, 4, 5]
    save(directory, 6)
    directory.prune(1)
    assert steps(directory) == [6]


def test_setting_aside_keeps_the_files_and_moves_latest(directory: CheckpointDirectory) -> None:
    save(directory, 1)
    for _ in range(2):  # the same step may go bad twice
        aside = directory.set_aside(save(directory, 2).path)
    assert aside.name == "corrupt-step-00000002"
    assert (aside / "__0_0.distcp").exists()
    assert steps(directory) == [1]
    assert os.readlink(directory.root / "latest") == "step-00000001"


def in_forked_child(function: Any, *args: Any) -> int:
    """Runs `function` in a fork of this process and gives its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            function(*args)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def save_and_prune_until(root: Path, fatal: int) -> None:
    """Saves steps 2, 3, and 3 again, keeping two; dies before the `fatal`-th access to the file system."""
    count = 0

    def watch(event: str, arguments: Any) -> None:
        nonlocal count
        in_rmtree = event in ("os.remove", "os.rmdir")  # by names relative to an open directory
        if in_rmtree or (event.startswith(("open", "os.")) and str(root) in repr(arguments)):
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)  # told of every access just before it happens; cannot be removed, but dies with this child
    directory = CheckpointDirectory(root)
    directory.clean_up()
    for step in (2, 3, 3):
        save(directory, step, b"second")
        directory.prune(2)


def test_a_kill_at_any_instant_loses_nothing_that_was_complete(tmp_path: Path) -> None:
    fatal, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        fatal += 1
        root = tmp_path / str(fatal)
        directory = CheckpointDirectory(root)
        save(directory, 1)
        code = in_forked_child(save_and_prune_until, root, fatal)
        for stage in ("before", "after"):
            found = directory.list()
            assert found, f"killed before access {fatal}: no checkpoint is left"
            broken = [info.path.name for info in found if find_problems(info)]
            assert not broken, f"killed before access {fatal}: {broken} count, {stage} the clean-up, and are not whole"
            assert directory.step_paths() == tuple(info.path for info in found), "half a checkpoint has a final name"
            if stage == "before":
                directory.clean_up()
        names = {path.name for path in root.iterdir()}
        assert names == {"latest", *(info.path.name for info in found)}, "a leftover was not removed"
        assert os.readlink(root / "latest") == found[-1].path.name
        shutil.rmtree(root)
    assert code == 0
    assert fatal > 50, "the child was not watched"
    assert [info.step for info in found] == [2, 3]


def test_listing_and_verifying_need_no_torch() -> None:
    program = (
        "import sys, parallel.checkpoint.directory, parallel.config, parallel.errors; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
