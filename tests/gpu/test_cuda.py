"""What only a CUDA device can show: the same code on NCCL, bf16 and Triton. Skipped where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megamodel.model.config import ModelConfig
from megamodel.model.decoder import Decoder, LossTerms
from tests.megamodel.small import MOE, build, random_tokens, small_config
from tests.megamodel.train.jobs import losses, small_job
from tests.requirements import requires

pytestmark = [pytest.mark.gpu, requires("cuda")]
ROOT = Path(__file__).parent.parent.parent


def gradients(decoder: Decoder, config: ModelConfig, device: str) -> tuple[float, dict[str, torch.Tensor]]:
    decoder.to(device)
    tokens = random_tokens(config, 4, 33).to(device)
    documents = (torch.arange(32, device=device) >= 20).int().expand(4, -1)
    terms: LossTerms = decoder(tokens[:, :-1], tokens[:, 1:], documents)
    (terms.token_loss_sum + terms.router_loss_sum).backward()
    return float(terms.token_loss_sum), {
        name: p.grad.cpu() for name, p in decoder.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("moe", [None, {**MOE, "first_layer": 1}])
def test_the_device_computes_what_the_processor_computes(moe: dict | None) -> None:
    config = small_config(moe=moe, qk_norm=True, init_std=0.1)
    expected_loss, expected = gradients(build(config), config, "cpu")
    loss, found = gradients(build(config), config, "cuda")
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() / gradient.norm() < 1e-3, name


def test_bf16_follows_float32_on_the_device() -> None:
    config = small_config(moe=MOE, init_std=0.1)
    exact, _ = gradients(build(config), config, "cuda")
    decoder = build(config)
    decoder.compute_dtype = torch.bfloat16
    rounded, _ = gradients(decoder, config, "cuda")
    assert rounded == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.timeout(600)
def test_one_nccl_rank_trains_compiled_in_bf16_and_resumes(tmp_path: Path, engine: str) -> None:
    job = replace(
        small_job(tmp_path, engine=engine, precision="bf16", compile="auto", model={"head_dim": 16}), device="cuda"
    )
    script = (
        "import json, sys, pickle; from rich.console import Console; from megamodel.train.run import train;"
        "result = train(pickle.load(open(sys.argv[1], 'rb')), console=Console(stderr=True));"
        "print(json.dumps([result.steps, result.finished]))"
    )
    import pickle

    environment = {
        **os.environ,
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29517",
    }
    for steps in (6, 12):
        (tmp_path / "job.pkl").write_bytes(
            pickle.dumps(replace(job, train=job.train.model_copy(update={"steps": steps})))
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "job.pkl")],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert json.loads(done.stdout.splitlines()[-1]) == [steps, True]
    found = losses(job)
    assert [step for step, _, _ in found] == list(range(1, 13))
    assert found[-1][1] < found[0][1]
