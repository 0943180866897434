"""A device's result is compared with what it must be; nvidia-smi's words are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.preflight.device import device_facts, graphics_cards, product_error
from tests.requirements import requires


def test_a_right_product_has_no_error() -> None:
    assert product_error(torch.device("cpu")) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_wrong_element_of_a_product_is_noticed(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    multiply = torch.Tensor.__matmul__

    def broken(self: torch.Tensor, other: torch.Tensor) -> Any:
        result = multiply(self, other)
        if result.dtype == dtype:
            result[3, 5] += 1
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", broken)
    name = str(dtype).removeprefix("torch.")
    assert product_error(torch.device("cpu")) == f"1 of 512 rows of a {name} matrix product are wrong"


def test_a_processor_has_no_name_and_no_time() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    told = {"name": None, "count": 0, "error": "", "seconds": None, "lacks": ""}
    assert [device_facts(0), device_facts(0, "auto"), device_facts(0, "cpu")] == [told] * 3
    assert device_facts(0, "cuda")["lacks"].startswith('run.device = "cuda": no CUDA device')


def test_more_ranks_than_gpus_lack_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    lacks = device_facts(2, "auto")["lacks"]
    assert lacks == 'run.device = "auto": fewer CUDA devices (2) than ranks'
    assert device_facts(2, "cpu")["lacks"] == device_facts(2)["lacks"] == ""


@pytest.mark.gpu
@requires("cuda")
def test_a_gpu_is_named_right_and_timed() -> None:
    told = device_facts(0)
    assert told["name"] == torch.cuda.get_device_name(0)
    assert told["error"] == ""
    assert 0 < told["seconds"] < 1


def fake_nvidia_smi(folder: Path, says: str, *, code: int = 0) -> str:
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\ncat <<EOF\n{says}\nEOF\nexit {code}\n')
    program.chmod(0o755)
    return str(program)


def test_what_nvidia_smi_says_of_each_card(tmp_path: Path) -> None:
    says = "NVIDIA H200, 570.86.15, Enabled, 0\nNVIDIA H200, 570.86.15, Enabled, 2"
    first, second = graphics_cards(fake_nvidia_smi(tmp_path, says))
    assert first == {"name": "NVIDIA H200", "driver": "570.86.15", "ecc": "Enabled", "uncorrected": "0"}
    assert second["uncorrected"] == "2"
    assert "--query-gpu=name,driver_version,ecc.mode.current,ecc.errors" in (tmp_path / "asked").read_text()


def test_no_driver_and_one_that_fails_are_no_cards(tmp_path: Path) -> None:
    assert graphics_cards(str(tmp_path / "absent")) == []
    assert graphics_cards(fake_nvidia_smi(tmp_path, "NVIDIA-SMI has failed", code=9)) == []
