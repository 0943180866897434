"""One process, many ranks, and what is said when they cannot meet or lose one another."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

from parallel.config import ParallelConfig
from parallel.errors import DeviceError, ParallelError
from parallel.world import RankEnvironment, World, choose_device, open_world, read_rank_environment
from tests.gloo_pool import GlooPool

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def converse(world: World) -> dict[str, Any]:
    control = world.new_control_group()
    return {
        "sum": world.all_reduce_sum(torch.tensor([1.0, world.rank])).tolist(),
        "from 0": world.broadcast_object({"rank": world.rank}),
        "from last": world.broadcast_object(world.rank, source=world.world_size - 1),
        "all": world.all_gather_object(world.rank * 10),
        "barrier": world.barrier(),
        "main": world.is_main,
        "backend": world.backend,
        "own group": control is not None and control is not world.control_group,
    }


def test_ranks_talk(gloo_ranks: GlooPool) -> None:
    for rank, found in enumerate(gloo_ranks(3, converse)):
        assert found == {
            "sum": [3.0, 3.0],
            "from 0": {"rank": 0},
            "from last": 2,
            "all": [0, 10, 20],
            "barrier": None,
            "main": rank == 0,
            "backend": "gloo",
            "own group": True,
        }


def test_one_process_has_the_same_face_and_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    with open_world(device="cpu") as world:
        found = converse(world)
        assert not torch.distributed.is_initialized()
    assert found["sum"] == [1.0, 0.0]
    assert found["all"] == [0]
    assert (found["backend"], found["main"], found["own group"]) == (None, True, False)


def lose_one(world: World) -> str:
    """Rank 1 leaves; rank 0 waits for it."""
    if world.rank == 1:
        return ""
    with pytest.raises(ParallelError) as caught:
        world.barrier()
    return str(caught.value)


def test_a_barrier_names_itself_when_a_rank_is_gone(gloo_ranks: GlooPool) -> None:
    message = gloo_ranks(2, lose_one, timeout_s=10)[0]
    assert "rank 0 of 2 lost the others in a barrier" in message
    assert "look at the ends of the other ranks' logs" in message
    assert "\n" not in message


def test_a_failed_collective_is_one_line(gloo_ranks: GlooPool) -> None:
    message = gloo_ranks(2, lose_one_in_all_reduce, timeout_s=10)[0]
    assert "rank 0 of 2 lost the others in an all-reduce" in message
    assert "\n" not in message


def lose_one_in_all_reduce(world: World) -> str:
    if world.rank == 1:
        return ""
    with pytest.raises(ParallelError) as caught:
        world.all_reduce_sum(torch.ones(1))
    return str(caught.value)


def test_rank_environment_is_read() -> None:
    assert read_rank_environment({}) is None
    assert read_rank_environment({"MASTER_ADDR": "somewhere", "MASTER_PORT": "1"}) is None
    assert read_rank_environment(TORCHRUN) == RankEnvironment(rank=1, world_size=2, local_rank=1, address="127.0.0.1:1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"LOCAL_RANK": None, "MASTER_PORT": None}, "but not LOCAL_RANK, MASTER_PORT: set all five as torchrun does"),
        ({"RANK": "one"}, "RANK='one' in the environment is not a whole number"),
        ({"RANK": "-1"}, "RANK='-1' in the environment is not a whole number"),
        ({"RANK": "2"}, "RANK=2 with WORLD_SIZE=2: ranks count from 0 to WORLD_SIZE - 1"),
    ],
)
def test_a_senseless_environment_is_refused(change: dict[str, str | None], message: str) -> None:
    environment = {name: value for name, value in (TORCHRUN | change).items() if value is not None}
    with pytest.raises(ParallelError, match=message.replace("(", r"\(")):
        read_rank_environment(environment)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu", 5) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 0) == torch.device("cpu")
    with pytest.raises(DeviceError, match='no CUDA device here: use "auto" or "cpu"') as refused:
        choose_device("cuda", 0)
    assert refused.value.exit_code == 2, "the next attempt of a job would say the same"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match="local rank 2 has no device of its own: this machine has 2"):
        choose_device("auto", 2)


def test_a_meeting_that_never_happens_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ParallelError, match=r"rank 1 could not meet the others at 127\.0\.0\.1:1 within 1 s") as caught,
        open_world(device="cpu", rendezvous_timeout_seconds=1.0),
    ):
        pass
    assert "raise parallel.rendezvous_timeout_seconds" in str(caught.value)
    assert "\n" not in str(caught.value)


ONE_OF_THREE = """
import sys
from parallel.world import open_world
print("started", flush=True)
sys.stdin.readline()
with open_world(device="cpu", timeout_seconds=4.0, rendezvous_timeout_seconds=60.0) as world:
    print(world.all_gather_object(world.rank), world.timeout.total_seconds())
"""


@pytest.mark.parametrize("late", [0, 2])
def test_ranks_may_come_further_apart_than_a_collective_may_take(late: int) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        places = {"WORLD_SIZE": "3", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", ONE_OF_THREE],
            env={**os.environ, **TORCHRUN, **places, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    early = [process for rank, process in enumerate(ranks) if rank != late]
    try:
        for process in ranks:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
        for process in early:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        # Longer than timeout_seconds, and they wait still.
        with pytest.raises(subprocess.TimeoutExpired):
            early[0].wait(timeout=5.0)
        assert early[1].poll() is None
        outputs = [process.communicate("\n", timeout=60) for process in (ranks[late], *early)]
    finally:
        for process in ranks:
            process.kill()
            process.wait(timeout=60)
    assert [output for output, _ in outputs] == ["[0, 1, 2] 4.0\n"] * 3, outputs


def gather_and_warn(world: World) -> tuple[list[list[float]], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gathered = world.all_gather(torch.tensor([1.0, world.rank]))
    return gathered.tolist(), [str(warning.message) for warning in caught]


def test_gathering_warns_of_nothing(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(2, gather_and_warn) == [([[1.0, 0.0], [1.0, 1.0]], [])] * 2


def gather_as_torch_2_11(world: World) -> list[list[float]]:
    kept = torch.distributed.all_gather_single
    del torch.distributed.all_gather_single
    try:
        return world.all_gather(torch.tensor([1.0, world.rank])).tolist()
    finally:
        torch.distributed.all_gather_single = kept


@pytest.mark.skipif(not hasattr(torch.distributed, "all_gather_single"), reason="this torch has the old name only")
def test_gathering_by_its_old_name(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(2, gather_as_torch_2_11) == [[[1.0, 0.0], [1.0, 1.0]]] * 2


def test_config_refuses_what_it_does_not_know() -> None:
    assert ParallelConfig().data_engine == "ddp"
    for wrong in ({"data_engine": "fsdp"}, {"timeout_seconds": 0}, {"reduce_dtype": "fp16"}, {"shards": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ParallelConfig.model_validate(wrong)
    assert all(field.description for field in ParallelConfig.model_fields.values())


def test_config_needs_no_torch() -> None:
    program = "import sys, parallel.config, parallel.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def test_a_rank_that_waits_for_the_others_still_hears_signals() -> None:
    """A rank that has reached the meeting point, and waits there in torch's native code for an answer."""
    script = (
        "import os, signal\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: os._exit(75))\n"
        "from parallel.world import open_world\n"
        "with open_world(device='cpu', rendezvous_timeout_seconds=120): pass\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        environment = {
            **os.environ,
            "RANK": "1",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(silent.getsockname()[1]),
        }
        process = subprocess.Popen([sys.executable, "-c", script], env=environment)
        try:
            connection, _ = silent.accept()
            with connection:
                connection.settimeout(60)
                connection.recv(1)  # it has said the first word, and waits for ours
                process.terminate()
                assert process.wait(timeout=60) == 75
        finally:
            process.kill()
            process.wait(timeout=10)
