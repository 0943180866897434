"""Saving and loading on real ranks: any number of them, either engine, and whatever goes wrong on the way."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.checkpoint import directory as directory_module
from parallel.checkpoint import store as store_module
from parallel.checkpoint.directory import CheckpointDirectory, CorruptCheckpoint
from parallel.checkpoint.store import CheckpointStore
from parallel.checkpoint.training_state import load_training_state, model_tensors, training_state
from parallel.errors import CheckpointError, CorruptCheckpointError
from parallel.world import World
from tests.gloo_pool import GlooPool, RankFailureError
from tests.parallel.models import build, optimizers_of, train
from tests.parallel.test_data_parallel import alone

Record = list[tuple[float, float]]


def save_in_the_middle(world: World, root: Path, engine: Any, asynchronous: bool) -> Record:
    """Three steps, a save, three steps that must not touch what is saved; gives the last three's record."""
    parallel = build(world, engine)
    optimizers = optimizers_of(parallel.model)
    parallel.model.load.fill_(7.0)
    train(world, parallel, optimizers, range(3))
    with CheckpointStore(root, world) as store:
        store.overlap_with(optimizers)
        state = training_state(model_tensors([parallel.model], {}), optimizers)
        state["per_rank"] = {f"rank-{world.rank}": {"rng": torch.full((3,), world.rank)}}
        state["note"] = ["plain", 1]
        store.save(3, state, metadata={"samples": 36}, asynchronous=asynchronous)
        return train(world, parallel, optimizers, range(3, 6))


def resume(world: World, root: Path, engine: Any) -> tuple[Record, Any]:
    """The same last three steps, by a model and optimizers of other weights that load the checkpoint."""
    parallel = build(world, engine, seed=99)
    optimizers = optimizers_of(parallel.model)
    with CheckpointStore(root, world) as store:
        info = store.latest()
        assert info is not None
        loaded = load_training_state(
            store,
            info,
            model_tensors([parallel.model], {}),
            optimizers,
            others={"note": None, "per_rank": {f"rank-{world.rank}": {"rng": torch.full((3,), -1)}}},
        )
        assert info.manifest.metadata == {"samples": 36}
        assert loaded.state["note"] == ["plain", 1]
        assert parallel.model.load.tolist() == [7.0] * 4
        found = (loaded.state["per_rank"][f"rank-{world.rank}"]["rng"][0].item(), loaded.missing)
        return train(world, parallel, optimizers, range(3, 6)), found


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_resume_on_the_same_ranks_is_bit_equal(
    gloo_ranks: GlooPool, tmp_path: Path, engine: str, asynchronous: bool
) -> None:
    expected = gloo_ranks(2, save_in_the_middle, tmp_path, engine, asynchronous)
    for rank, (record, found) in enumerate(gloo_ranks(2, resume, tmp_path, engine)):
        assert record == expected[rank]
        assert found == (rank, ())


LAYOUTS = [
    (("ddp", 2), ("fsdp2", 3)),
    (("fsdp2", 2), ("ddp", 1)),
    (("fsdp2", 3), ("fsdp2", 2)),
    (("ddp", 3), ("ddp", 2)),
]


@pytest.mark.parametrize(("saver", "loader"), LAYOUTS)
def test_resume_on_another_layout_continues(gloo_ranks: GlooPool, tmp_path: Path, saver: Any, loader: Any) -> None:
    expected = gloo_ranks(saver[1], save_in_the_middle, tmp_path, saver[0], True)[0]
    for rank, (record, found) in enumerate(gloo_ranks(loader[1], resume, tmp_path, loader[0])):
        torch.testing.assert_close(torch.tensor(record), torch.tensor(expected), rtol=1e-5, atol=0)
        assert found == ((rank, ()) if rank < saver[1] else (-1, (f"per_rank.rank-{rank}.rng",)))


def test_two_ranks_to_one_process_without_a_group_and_back(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    expected = gloo_ranks(2, save_in_the_middle, tmp_path / "two", "fsdp2", True)[0]
    record, _ = resume(alone(), tmp_path / "two", "ddp")
    torch.testing.assert_close(torch.tensor(record), torch.tensor(expected), rtol=1e-5, atol=0)
    save_in_the_middle(alone(), tmp_path / "one", "ddp", True)
    again = gloo_ranks(2, resume, tmp_path / "one", "fsdp2")[0][0]
    torch.testing.assert_close(torch.tensor(again), torch.tensor(expected), rtol=1e-5, atol=0)


def test_ranks_share_the_writing_of_what_all_hold(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    gloo_ranks(2, save_in_the_middle, tmp_path, "ddp", True)
    (info,) = CheckpointDirectory(tmp_path).list()
    sizes = [info.manifest.files[f"__{rank}_0.distcp"].size for rank in range(2)]
    assert max(sizes) < 1.2 * min(sizes)
    assert info.manifest.world_size == 2
    CheckpointDirectory(tmp_path).verify(info)


def _small(world: World, value: float = 0.0) -> dict[str, Any]:
    return {"w": torch.full((1000,), value), "v": torch.full((1000,), value), "object": {"value": value}}


def save_many(world: World, root: Path) -> Any:
    with CheckpointStore(root, world, keep_last=2) as store:
        buffers = set()
        for step in range(1, 5):
            handle = store.save(step, _small(world, step), metadata={}, asynchronous=True)
            assert handle.wait().step == step
            buffers.add(tuple(sorted(buffer.data_ptr() for buffer in store._buffers._buffers.values())))
        assert len(buffers) == 1, "each save made new buffers"
        return (root / "latest").resolve().name, [info.step for info in store.directory.list()]


def test_saves_follow_one_another_and_old_ones_go(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    assert gloo_ranks(2, save_many, tmp_path) == [("step-00000004", [3, 4])] * 2


def save_while_changing(world: World, root: Path) -> list[float]:
    """Changes the state while the writer is held back; gives what was saved."""
    released = threading.Event()
    write = CheckpointStore._write
    CheckpointStore._write = lambda self, *args: released.wait(30) and write(self, *args)  # type: ignore[assignment]
    try:
        with CheckpointStore(root, world) as store:
            state = _small(world, 1.0)
            handle = store.save(1, state, metadata={}, asynchronous=True)
            assert not handle.done
            assert not handle.finished_within(0.0)
            store.poll()
            state["w"].fill_(2.0)
            state["object"]["value"] = 2.0
            released.set()
            loaded = store.load(handle.wait(), _small(world)).state
            return [loaded["w"].max().item(), loaded["object"]["value"]]
    finally:
        CheckpointStore._write = write  # type: ignore[method-assign]


def test_asynchronous_save_keeps_the_state_of_its_moment(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    assert gloo_ranks(2, save_while_changing, tmp_path) == [[1.0, 1.0]] * 2


def step_while_copying(world: World, root: Path) -> Any:
    """Holds the thread's copy back; gives who waited for it, and what was saved."""
    weight = torch.nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    free, waited = torch.ones(1000), threading.Event()
    with CheckpointStore(root, world) as store:
        store.overlap_with([optimizer])
        copy, finish_staging = store._buffers.copy, store.finish_staging

        def copy_when_awaited(state: dict[str, Any], moment: Any) -> dict[str, Any]:
            if "weight" in state:
                waited.wait(30)
            return copy(state, moment)

        def announce() -> None:
            waited.set()
            finish_staging()

        store._buffers.copy = copy_when_awaited  # type: ignore[method-assign]
        store.finish_staging = announce  # type: ignore[method-assign]
        handle = store.save(1, {"weight": weight, "free": free}, metadata={}, asynchronous=True)
        free.fill_(2.0)  # not the optimizer's: copied before save returned
        returned_first = not waited.is_set()
        weight.grad = torch.ones(1000)
        optimizer.step()
        loaded = store.load(handle.wait(), {"weight": torch.zeros(1000), "free": torch.zeros(1000)}).state
        return (
            returned_first,
            handle.stall_seconds > 0,
            weight[0].item(),
            loaded["weight"][0].item(),
            loaded["free"][0].item(),
        )


def test_an_optimizers_step_waits_for_the_copy_of_what_it_owns(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    assert gloo_ranks(1, step_while_copying, tmp_path) == [(True, True, 0.0, 1.0, 1.0)]


def fail_on_one_rank(world: World, root: Path) -> list[str]:
    """Rank 1 cannot hash its files; the save after works again."""
    record_file = store_module.record_file

    def full_disk(path: Path) -> Any:
        raise OSError(28, "No space left on device")

    messages = []
    with CheckpointStore(root, world) as store:
        store.save(1, _small(world), metadata={}, asynchronous=False)
        if world.rank == 1:
            store_module.record_file = full_disk
        try:
            for asynchronous in (False, True):
                with pytest.raises(CheckpointError) as caught:
                    store.save(2, _small(world), metadata={}, asynchronous=asynchronous).wait()
                messages.append(str(caught.value))
            with pytest.raises(CheckpointError):
                store.poll()
        finally:
            store_module.record_file = record_file
        latest = store.latest()
        assert latest is not None
        assert latest.step == 1
        store.save(3, _small(world), metadata={}, asynchronous=True)
    assert [info.step for info in store.directory.list()] == [1, 3]
    return messages


def test_an_error_on_one_rank_is_an_error_on_all(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    for messages in gloo_ranks(2, fail_on_one_rank, tmp_path):
        for message in messages:
            assert "could not be written" in message
            assert "rank 1: OSError" in message
            assert "No space left" in message


def fail_in_the_writer(world: World, root: Path) -> str:
    from torch.distributed.checkpoint import FileSystemWriter

    def full_disk(self: Any, *args: Any) -> Any:
        raise OSError(28, "No space left on device")

    write_data = FileSystemWriter.write_data
    if world.rank == 1:
        FileSystemWriter.write_data = full_disk  # type: ignore[method-assign]
    try:
        with CheckpointStore(root, world) as store, pytest.raises(CheckpointError) as caught:
            store.save(2, _small(world), metadata={}, asynchronous=False)
    finally:
        FileSystemWriter.write_data = write_data  # type: ignore[method-assign]
    return str(caught.value)


def test_an_error_of_the_writer_is_one_line(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    for message in gloo_ranks(2, fail_in_the_writer, tmp_path):
        assert message == "a checkpoint was not saved: rank 1: OSError: [Errno 28] No space left on device"


def latest_of(world: World, root: Path) -> Any:
    corrupt: list[CorruptCheckpoint] = []
    with CheckpointStore(root, world) as store:
        info = store.latest(on_corrupt=corrupt.append)
    return (info.step if info else None), [(entry.step, entry.path.name, entry.problems) for entry in corrupt]


def test_a_corrupt_checkpoint_is_reported_and_the_one_before_taken(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    gloo_ranks(2, save_many, tmp_path)
    victim = tmp_path / "step-00000004" / "__1_0.distcp"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    problem = "the content of __1_0.distcp has changed (SHA-256 differs)"
    assert gloo_ranks(3, latest_of, tmp_path) == [(3, [(4, "corrupt-step-00000004", (problem,))])] * 3
    assert (tmp_path / "latest").resolve().name == "step-00000003"
    assert gloo_ranks(2, latest_of, tmp_path) == [(3, [])] * 2


def test_a_checkpoint_without_its_manifest_does_not_count(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    gloo_ranks(2, save_many, tmp_path)
    for step in (3, 4):
        (tmp_path / f"step-0000000{step}" / "manifest.json").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"none is good \(step-00000004: .*manifest\.json is missing"):
        latest_of(alone(), tmp_path)
    assert latest_of(alone(), tmp_path / "nothing") == (None, [])


def refusal_of(world: World, root: Path) -> Any:
    """What `latest` says where it takes no checkpoint, and what lies in the folder afterwards."""
    with CheckpointStore(root, world) as store, pytest.raises(CheckpointError) as caught:
        store.latest()
    world.barrier()
    return str(caught.value), caught.value.exit_code, sorted(path.name for path in root.glob("*step*"))


def test_where_no_checkpoint_is_good_nothing_begins_anew(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    gloo_ranks(2, save_many, tmp_path)
    for shard in tmp_path.glob("step-*/__0_0.distcp"):
        shard.write_bytes(b"")
    for _ in range(2):  # the second start finds what the first one found
        for message, code, names in gloo_ranks(2, refusal_of, tmp_path):
            assert "holds checkpoints, and none is good (step-00000004: __0_0.distcp has 0 bytes" in message
            assert "remove that folder, or start under another name" in message
            assert (code, names) == (3, ["step-00000003", "step-00000004"])
    for step in (3, 4):
        (tmp_path / f"step-0000000{step}").rename(tmp_path / f"corrupt-step-0000000{step}")
    message, code, _ = refusal_of(alone(), tmp_path)
    assert "none is good (corrupt-step-00000004)" in message
    assert code == 3


def refuse_to_read(world: World, root: Path, name: str) -> Any:
    """As `refusal_of`, where one file of the newest checkpoint cannot be read."""
    record_file, read_bytes = directory_module.record_file, Path.read_bytes

    def stale(path: Path) -> Any:
        if path.name == name:
            raise OSError(116, "Stale file handle")
        return read_bytes(path) if name == "manifest.json" else record_file(path)

    if name == "manifest.json":
        Path.read_bytes = stale  # type: ignore[method-assign]
    else:
        directory_module.record_file = stale
    try:
        return refusal_of(world, root)
    finally:
        directory_module.record_file = record_file
        Path.read_bytes = read_bytes  # type: ignore[method-assign]


@pytest.mark.parametrize("name", ["manifest.json", "__1_0.distcp"])
def test_what_cannot_be_read_is_not_taken_for_corrupt(gloo_ranks: GlooPool, tmp_path: Path, name: str) -> None:
    gloo_ranks(2, save_many, tmp_path)
    for message, code, names in gloo_ranks(2, refuse_to_read, tmp_path, name):
        assert f"step-00000004: cannot read {name} (Stale file handle); nothing was changed" in message
        assert (code, names) == (1, ["step-00000003", "step-00000004"])
    assert gloo_ranks(2, latest_of, tmp_path) == [(4, [])] * 2


def test_a_manifest_of_another_version_is_left_alone(tmp_path: Path) -> None:
    save_many(alone(), tmp_path)
    manifest = tmp_path / "step-00000004" / "manifest.json"
    manifest.write_text('{"version": 2, "anything": []}')
    message, code, names = refusal_of(alone(), tmp_path)
    assert "its manifest is of version 2, and this program reads version 1; use the program that wrote it" in message
    assert (code, names) == (1, ["step-00000003", "step-00000004"])


def die_while_saving(world: World, root: Path, where: str) -> None:
    """Rank 1 or 0 kills itself in the middle of the second save."""
    with CheckpointStore(root, world) as store:
        store.save(1, _small(world, 1.0), metadata={}, asynchronous=False)

        def die(*args: Any, **options: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

        if where == "writing" and world.rank == 1:
            store_module.record_file = die
        if where == "committing" and world.rank == 0:
            directory_module._sync_directory = die
        store.save(2, _small(world, 2.0), metadata={}, asynchronous=True)


@pytest.mark.parametrize(("where", "rank"), [("writing", 1), ("committing", 0)])
def test_kill_of_a_rank_in_the_middle_of_a_save(gloo_ranks: GlooPool, tmp_path: Path, where: str, rank: int) -> None:
    with pytest.raises(RankFailureError) as caught:
        gloo_ranks(2, die_while_saving, tmp_path, where, timeout_s=30)
    assert caught.value.died == (rank,)
    assert "a checkpoint was not saved" in str(caught.value), "the surviving rank ends with a clear error"
    assert (tmp_path / ".partial-step-00000002").is_dir()
    assert gloo_ranks(2, latest_of, tmp_path) == [(1, [])] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


def misfits(world: World, root: Path) -> list[str]:
    saved = {"model": {"a": torch.zeros(3), "b": torch.zeros(2)}, "per_rank": {f"rank-{world.rank}": 1}}
    messages = []
    with CheckpointStore(root, world) as store:
        info = store.save(1, saved, metadata={}, asynchronous=False).wait()
        for wrong in (
            {"model": {"a": torch.zeros(3), "b": torch.zeros(2), "c": torch.zeros(1)}},
            {"model": {"a": torch.zeros(3)}},
            {"model": {"a": torch.zeros(4), "b": torch.zeros(2)}},
            {"model": {"a": torch.zeros(3), "b": torch.zeros(2, dtype=torch.bfloat16)}},
            {"model": {"a": torch.zeros(3), "b": None}},
        ):
            with pytest.raises(CheckpointError) as caught:
                store.load(info, wrong)
            messages.append(str(caught.value))
    return messages


def test_a_checkpoint_that_does_not_fit_is_refused(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    for messages in gloo_ranks(2, misfits, tmp_path):
        more, fewer, shape, dtype, kind = messages
        assert "it lacks model.c" in more
        assert "it has model.b, which this run does not" in fewer
        assert "model.a is float32 [3] there and float32 [4] here" in shape
        assert "model.b is float32 [2] there and bfloat16 [2] here" in dtype
        assert "model.b is float32 [2] there and no tensor here" in kind
        assert all("start a run of another name" in message for message in messages)
