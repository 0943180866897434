from pathlib import Path

import pytest

import cluster.hardware
import launcher.place
from cluster.hardware import Accelerator
from launcher.errors import ConfigError
from launcher.place import Place, find_place, num_usable_gpus, ranks_to_start, torch_has_cuda


def test_alone_or_about_to_start_ranks() -> None:
    assert find_place({}, None) == Place(rank=0, num_ranks=1, joins=False, child_of_mega=False)
    assert find_place({}, 4) == Place(rank=0, num_ranks=4, joins=False, child_of_mega=False)


def test_a_world_in_the_environment_is_joined() -> None:
    world = {"RANK": "1", "WORLD_SIZE": "4"}
    assert find_place(world, None) == Place(rank=1, num_ranks=4, joins=True, child_of_mega=False)
    assert find_place(world, 4).joins
    assert find_place({**world, "MEGA_FAILURE_FILE": "x"}, 4).child_of_mega


def test_ranks_that_contradict_the_environment() -> None:
    with pytest.raises(ConfigError, match=r"^--ranks 2: this process already is rank 1 of 4 \(RANK and"):
        find_place({"RANK": "1", "WORLD_SIZE": "4"}, 2)


@pytest.mark.parametrize(
    "world",
    [
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
    ],
)
def test_an_environment_that_makes_no_sense(world: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="are not a rank and a number of ranks: set both as torchrun does"):
        find_place(world, None)


def _machine_with(monkeypatch: pytest.MonkeyPatch, num_gpus: int, *, cuda: bool = True) -> None:
    gpus = (Accelerator(name="NVIDIA H200", memory_bytes=1),) * num_gpus
    monkeypatch.setattr(cluster.hardware, "nvidia_accelerators", lambda: gpus)
    monkeypatch.setattr(launcher.place, "torch_has_cuda", lambda: cuda)


def test_a_gpu_serves_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    _machine_with(monkeypatch, 1)
    assert ranks_to_start(2, device="auto", environ={}, say=said.append) == 1
    assert said == ["1 GPU here, and a GPU serves one rank: starting 1 instead of 2."]
    assert ranks_to_start(2, device="cpu", environ={}, say=said.append) == 2
    _machine_with(monkeypatch, 8)
    assert ranks_to_start(4, device="auto", environ={}, say=said.append) == 4
    assert len(said) == 1


def test_gpus_that_torch_would_not_see_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine_with(monkeypatch, 4)
    assert num_usable_gpus({}) == 4
    assert num_usable_gpus({"CUDA_VISIBLE_DEVICES": "0,2"}) == 2
    assert num_usable_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert num_usable_gpus({"CUDA_VISIBLE_DEVICES": "1,-1,2"}) == 1
    _machine_with(monkeypatch, 4, cuda=False)
    assert num_usable_gpus({}) == 0


def test_torch_is_asked_without_importing_it() -> None:
    import torch

    assert torch_has_cuda() == (torch.version.cuda is not None)


def test_no_torch_has_no_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not torch_has_cuda()
