"""A run under DeepSpeed: the same trainer, records and checkpoints, so that it may go on under another engine and back."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamodel.train.config import TrainConfig
from megamodel.train.job import TrainingJob
from megamodel.train.restore import restore_decoder
from megamodel.train.run_directory import RunDirectory
from parallel.config import ParallelConfig
from parallel.world import World
from tests.gloo_pool import GlooPool
from tests.megamodel.train.jobs import losses, prepared, small_job, train_job
from tests.requirements import requires

pytestmark = [requires("deepspeed")]
ADAMW = {"name": "adamw", "lr": 3e-3, "eps": 1e-6}


def job_of(root: Path, name: str, engine: str, *, steps: int, **deepspeed: Any) -> TrainingJob:
    job = small_job(root, name=name, optimizer=ADAMW, steps=steps, schedule={"name": "constant", "warmup_steps": 2})
    parallel = ParallelConfig(data_engine=engine, deepspeed=deepspeed, timeout_seconds=100)
    return replace(job, parallel=parallel)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_changes_between_deepspeed_and_our_engines(gloo_ranks: GlooPool, tmp_path: Path, stage: int) -> None:
    whole = job_of(tmp_path, "whole", "ddp", steps=9)
    prepared(whole)
    gloo_ranks(1, train_job, whole)
    for steps, engine in ((3, "deepspeed"), (6, "fsdp2"), (9, "deepspeed")):
        result = gloo_ranks(
            2, train_job, job_of(tmp_path, "crossing", engine, steps=steps, zero_stage=stage), timeout_s=200
        )
        assert all(one.finished and one.steps == steps for one in result)
    crossing = job_of(tmp_path, "crossing", "ddp", steps=9)
    torch.testing.assert_close(torch.tensor(losses(crossing)), torch.tensor(losses(whole)), rtol=2e-5, atol=0)
    ours, theirs = (restore_decoder(RunDirectory(job.run_directory)).decoder for job in (whole, crossing))
    for (name, expected), found in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=name)


def linear_after(world: World, job: TrainingJob) -> str:
    """Who multiplies in this process once a run is over."""
    train_job(world, job)
    return str(torch.nn.functional.linear.__module__)


def test_torch_is_left_as_it_was(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    job = job_of(tmp_path, "run", "deepspeed", steps=1, zero_stage=3)
    prepared(job)
    expected = str(torch.nn.functional.linear.__module__)
    assert gloo_ranks(2, linear_after, job, timeout_s=200) == [expected] * 2


def test_another_model_is_refused(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    job = job_of(tmp_path, "run", "deepspeed", steps=2, zero_stage=2)
    prepared(job)
    gloo_ranks(2, train_job, job, timeout_s=200)
    other = replace(job, train=TrainConfig(**{**job.train.model_dump(), "steps": 4}), seed=8)
    with pytest.raises(AssertionError, match=r"run\.seed was 7 and is 8"):
        gloo_ranks(2, train_job, other, timeout_s=200)
    shutil.rmtree(job.run_directory)
