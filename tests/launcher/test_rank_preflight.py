"""Preflight in the ranks of a run: real ranks, each a host of its own by name, that train afterwards, or end with 3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import NetworkError
from cluster.network_settings import NetworkChoice
from launcher.config import RunConfig, load_run_config
from launcher.fabric_place import fabric_place
from launcher.rank_preflight import describe_rank, preflighted
from tests.launcher.conftest import Mega
from tests.launcher.named_hosts import ranks_on_hosts

QUICK = ("--set", "launch.preflight.fabric=false", "--set", "export.format=none", "--set", "train.steps=2")


def verdict(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "preflight.json").read_text())


def losses(run: Path) -> list[tuple[Any, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def test_training_after_preflight_is_bit_equal_to_training_without(tiny: Path, mega_process: Mega) -> None:
    words = ("train", tiny, "--ranks", "2", "--set", "train.steps=3")
    plain = mega_process(*words, "--set", "run.name=plain")
    assert plain.code == 0, plain.err
    file = tiny.parent / "verdicts" / "preflight.json"
    looked_at = mega_process(*words, "--set", "run.name=looked-at", MEGA_PREFLIGHT=str(file))
    assert looked_at.code == 0, looked_at.err
    assert "Preflight of 2 ranks on 1 host: nothing is wrong (" in looked_at.out
    assert json.loads(file.read_text())["ok"] is True
    runs = [tiny.parent / "runs" / name for name in ("plain", "looked-at")]
    assert len(losses(runs[0])) == 3
    assert losses(runs[0]) == losses(runs[1])
    weights = [next((run / "export" / "hf").glob("*.safetensors")).read_bytes() for run in runs]
    assert weights[0] == weights[1]


def test_ranks_of_torchrun_meet_twice_in_its_own_store(tiny: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "launcher")
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "MEGA_PREFLIGHT": str(tiny.parent / "preflight.json")}
    done = subprocess.run(
        [sys.executable, *torchrun, "train", str(tiny), *QUICK],
        env=environ,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert verdict(tiny.parent)["details"]["hosts"].popitem()[1] == [0, 1]
    assert len(losses(tiny.parent / "runs" / "tiny")) == 2


def test_ranks_that_differ_end_with_3_all_of_them_and_the_verdict_is_written(tiny: Path) -> None:
    differing = {"NCCL_IB_TC": "106"}
    words = ["train", str(tiny), *QUICK, "--set", "train.global_batch_size=3"]
    ended = ranks_on_hosts(words, {}, differing, {}, verdict=tiny.parent / "preflight.json")
    said = "n1 differs from the others in the variable NCCL_IB_TC (106 there, and not set elsewhere). Set it for all ranks alike"
    for one in ended:
        assert one.code == 3, one.err
        assert f"error: preflight: {said}" in one.err
        assert "Traceback" not in one.err
    found = verdict(tiny.parent)
    assert (found["ok"], found["bad_hosts"]) == (False, ["n1"])
    assert found["reasons"]["n1"] == found["sentences"][0]
    assert not (tiny.parent / "runs" / "tiny" / "config.toml").exists(), "nothing was trained"


def test_hosts_with_other_numbers_of_cores_have_other_numbers_of_threads(tiny: Path) -> None:
    threads = [{"OMP_NUM_THREADS": number, "MEGA_CHOSEN": "OMP_NUM_THREADS"} for number in ("1", "2")]
    ended = ranks_on_hosts(["train", str(tiny), *QUICK], *threads, verdict=tiny.parent / "preflight.json")
    assert [one.code for one in ended] == [0, 0], ended[0].err
    assert verdict(tiny.parent)["findings"] == []


def test_where_it_only_warns_the_run_goes_on(tiny: Path) -> None:
    words = ["train", str(tiny), *QUICK, "--set", "launch.preflight.on_bad_host=warn"]
    ended = ranks_on_hosts(words, {}, {"NCCL_IB_TC": "106"}, verdict=tiny.parent / "preflight.json")
    assert [one.code for one in ended] == [0, 0], ended[0].err
    assert "Preflight of 2 ranks on 2 hosts: something is wrong (" in ended[0].out
    assert "Preflight" not in ended[1].out
    assert verdict(tiny.parent)["ok"] is False
    assert len(losses(tiny.parent / "runs" / "tiny")) == 2


def test_a_network_that_the_hosts_lack_is_told_by_preflight(tiny: Path) -> None:
    words = ["train", str(tiny), *QUICK, "--set", "launch.network=infiniband"]
    ended = ranks_on_hosts(words, {}, {}, verdict=tiny.parent / "preflight.json")
    assert [one.code for one in ended] == [3, 3], ended[0].err
    assert 'n1: launch.network = "infiniband" needs an active InfiniBand port, and has none' in ended[0].err
    assert [finding["kind"] for finding in verdict(tiny.parent)["findings"]] == ["network", "network"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_an_error_and_ends_a_job_at_once(tiny: Path, mega_process: Mega) -> None:
    wants = ("--set", "run.device=cuda")
    (alone,) = ranks_on_hosts(["train", str(tiny), *QUICK, *wants], {}, verdict=tiny.parent / "preflight.json")
    assert alone.code == 3, alone.err
    assert 'error: preflight: run.device = "cuda": no CUDA device' in alone.err
    assert " on n0. " in alone.err
    # A rank that finds it out by itself refuses the configuration.
    job = mega_process("launch", tiny, "--on", "local", *wants, "--set", "launch.preflight.enabled=false")
    assert job.code == 2, job.err
    assert 'run.device = "cuda", but torch sees no CUDA device here' in job.err
    logs = tiny.parent / "runs" / "tiny" / "logs"
    assert [path.name for path in logs.iterdir() if path.is_dir()] == ["attempt-1"]


EARLY = """
import gc, os, sys, time
from datetime import timedelta
from pathlib import Path
from launcher.config import load_run_config
from launcher.fabric_place import fabric_place
from launcher.rank_preflight import describe_rank, preflighted
from parallel.world import open_world

config = load_run_config([Path(sys.argv[1])], sys.argv[2:]).config
came = Path("rank 1 came")
with preflighted(os.environ, config, say=print):
    import torch.distributed as dist
    if os.environ["RANK"] == "0":
        gc.collect()  # whatever preflight holds by accident
        latest = time.monotonic() + 60.0
        while not came.exists() and time.monotonic() < latest:
            time.sleep(0.02)
    else:
        port = int(os.environ["MASTER_PORT"])
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
        store.set("early", "still there")
        came.touch()
    with open_world(device="cpu") as world:
        print("met:", sum(world.all_gather_object(1)))
        if world.rank == 0:
            again = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
            print("found:", again.get("early").decode())
        world.barrier()
"""


def test_a_rank_that_is_ahead_of_rank_0_comes_to_the_store_that_stays(tiny: Path) -> None:
    """Rank 0 begins to train only once rank 1 has come to the meeting point: it must have found one."""
    script = tiny.parent / "early.py"
    script.write_text(EARLY)
    words = [str(tiny), "launch.preflight.fabric=false"]
    here = {"PYTHONPATH": str(Path(__file__).parents[2])}
    ended = ranks_on_hosts(words, here, here, verdict=tiny.parent / "preflight.json", program=[str(script)])
    assert [one.code for one in ended] == [0, 0], ended[0].err + ended[1].err
    assert "met: 2\nfound: still there" in ended[0].out


@pytest.fixture
def config(tiny: Path) -> RunConfig:
    return load_run_config([tiny]).config


def lone_rank(**more: str) -> dict[str, str]:
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    return {**place, "MEGA_HOST_NAME": "n7", **more}


def test_a_rank_that_no_job_has_launched_is_left_alone(config: RunConfig) -> None:
    environ = lone_rank()
    with preflighted(environ, config, say=print):
        assert environ == lone_rank()


def test_without_preflight_a_launched_rank_still_gets_its_network(config: RunConfig) -> None:
    environ = lone_rank(MEGA_ATTEMPT="1", NCCL_NET="Socket")
    with preflighted(environ, config, say=print):
        assert environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
        assert environ["NCCL_NET"] == "Socket"


def test_a_host_that_has_all_ranks_needs_no_network(config: RunConfig) -> None:
    environ = lone_rank(MEGA_ATTEMPT="1", LOCAL_WORLD_SIZE="2")
    with preflighted(environ, config, say=print):
        assert environ == lone_rank(MEGA_ATTEMPT="1", LOCAL_WORLD_SIZE="2")


def test_without_preflight_a_host_that_lacks_the_network_says_so_itself(tiny: Path) -> None:
    wants = load_run_config([tiny], ["launch.network=roce"]).config
    with pytest.raises(NetworkError, match=r'n7: launch.network = "roce" needs an active Ethernet port') as caught:
        preflighted(lone_rank(MEGA_ATTEMPT="1"), wants, say=print).__enter__()
    assert caught.value.exit_code == 3


def test_what_people_should_know_of_the_network_is_said_once_on_rank_0(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def choose(*args: Any, on_gpus: bool, **options: Any) -> NetworkChoice:
        asked.append(on_gpus)
        return NetworkChoice(
            kind="infiniband", settings=(), kept=(), ports=(), left_out={}, interface=None, notes=("a plug-in",)
        )

    monkeypatch.setattr("cluster.network_settings.choose_network", choose)
    said: list[str] = []
    on_processors = load_run_config([tiny], ["run.device=cpu"]).config
    for rank, asked_for in (("0", load_run_config([tiny]).config), ("1", on_processors)):
        with preflighted(lone_rank(MEGA_ATTEMPT="1", RANK=rank), asked_for, say=said.append):
            pass
    assert said == ["a plug-in"]
    assert asked == [True, False], "ranks on processors open no RDMA device"


def test_a_network_that_cannot_be_used_is_what_a_rank_says_of_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = tmp_path / "sys/class/infiniband/mlx5_0/ports/1"
    port.mkdir(parents=True)
    for name, text in {"link_layer": "InfiniBand", "state": "4: ACTIVE", "phys_state": "5: LinkUp"}.items():
        (port / name).write_text(text)
    for name, value in lone_rank().items():
        monkeypatch.setenv(name, value)
    facts = describe_rank(fabric_place(os.environ), root=tmp_path)
    assert "no /dev/infiniband/uverbs* to open it by" in facts.answer({"ask": "rank"})["network"]["error"]
