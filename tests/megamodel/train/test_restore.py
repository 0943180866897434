"""Reading a run's checkpoint while the run goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megamodel.errors import ModelError
from megamodel.train import restore
from megamodel.train.restore import restore_decoder
from megamodel.train.run_directory import RunDirectory
from parallel.checkpoint.directory import CheckpointDirectory
from parallel.errors import CheckpointError
from tests.gloo_pool import GlooPool, RankFailureError
from tests.megamodel.train.jobs import small_job, train_job


@pytest.fixture
def run(gloo_ranks: GlooPool, tmp_path: Path) -> RunDirectory:
    """Checkpoints of steps 1, 2 and 3."""
    job = small_job(tmp_path, steps=3, checkpoint={"every_steps": 1, "keep_last": 3}, validation={"every_steps": 0})
    gloo_ranks(1, train_job, job)
    return RunDirectory(job.run_directory)


def pruning_first(function: Callable[..., Any], run: RunDirectory, times: int) -> Callable[..., Any]:
    """`function`, before whose first calls the newest checkpoint is removed, as a live run removes its oldest."""
    left = [times]

    def prune_and_call(*args: Any, **options: Any) -> Any:
        if left[0]:
            left[0] -= 1
            shutil.rmtree(CheckpointDirectory(run.checkpoints).step_paths()[-1])
        return function(*args, **options)

    return prune_and_call


@pytest.mark.parametrize("stage", ["read", "verify", "load"])
def test_a_checkpoint_that_is_pruned_meanwhile_gives_way_to_another(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    if stage == "load":
        monkeypatch.setattr(dcp, "load", pruning_first(dcp.load, run, 2))
    else:
        monkeypatch.setattr(CheckpointDirectory, stage, pruning_first(getattr(CheckpointDirectory, stage), run, 2))
    restored = restore_decoder(run)
    assert (restored.step, restored.corrupt) == (1, ())
    assert all(torch.isfinite(tensor).all() for tensor in restored.decoder.state_dict().values())


def test_checkpoints_that_all_vanish_are_told(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp, "load", pruning_first(dcp.load, run, 3))
    with pytest.raises(ModelError, match=r"removed 3 checkpoints, each while it was read; try again, or raise"):
        restore_decoder(run)


def test_the_step_asked_for_may_be_pruned_meanwhile(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp, "load", pruning_first(dcp.load, run, 1))
    with pytest.raises(ModelError, match=r"no checkpoint of step 3; there are: 1, 2"):
        restore_decoder(run, step=3)


def test_what_cannot_be_read_is_an_error_and_not_passed_over(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(path: Path) -> bytes:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(restore.Path, "read_bytes", stale)
    with pytest.raises(CheckpointError, match=r"step-00000003: cannot read manifest\.json \(Stale file handle\)"):
        restore_decoder(run)


def test_a_run_without_a_good_checkpoint_ends_and_keeps_its_metrics(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    job = small_job(tmp_path, steps=2, checkpoint={"every_steps": 1}, validation={"every_steps": 0})
    gloo_ranks(2, train_job, job)
    run = RunDirectory(job.run_directory)
    before = run.metrics.read_bytes()
    for manifest in run.checkpoints.glob("step-*/manifest.json"):
        manifest.unlink()
    for _ in range(2):
        with pytest.raises(RankFailureError, match=r"none is good.*remove that folder, or start under another name"):
            gloo_ranks(2, train_job, job)
    assert run.metrics.read_bytes() == before
