"""A run under watch: it computes the same numbers, and a slow rank is named in its records."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.config import FabricConfig
from cluster.fabric.groups import world_group
from megamodel.model.decoder import Decoder
from megamodel.train.job import TrainingJob, TrainingResult
from parallel.world import World
from tests.cluster.fabric.collectives import FakeCollectives, swept
from tests.gloo_pool import GlooPool
from tests.megamodel.train.jobs import losses, prepared, small_job, train_job

SLOW_RANK = 1


def _job(
    root: Path, name: str, monitor: str, *, engine: str = "ddp", layout: dict[str, Any], **train: Any
) -> TrainingJob:
    job = small_job(root, name=name, engine=engine, **train)
    parallel = job.parallel.model_copy(update={"timeout_seconds": 90.0, **layout})
    return replace(job, parallel=parallel, fabric=FabricConfig(monitor=monitor, window_steps=2))


@pytest.mark.parametrize(
    ("engine", "layout"),
    [("ddp", {}), ("fsdp2", {"tp": 2}), ("fsdp2", {"pp": 2})],
    ids=["ddp", "fsdp2-tp", "fsdp2-pp"],
)
def test_a_watched_run_computes_the_same_numbers(
    gloo_ranks: GlooPool, tmp_path: Path, engine: str, layout: dict[str, Any]
) -> None:
    figures = []
    for monitor in ("off", "on"):
        job = _job(tmp_path, monitor, monitor, engine=engine, layout=layout, checkpoint={"every_steps": 0})
        prepared(job)
        gloo_ranks(4 if layout else 2, train_job, job, timeout_s=150.0)
        figures.append(losses(job))
        assert (job.run_directory / "fabric").exists() == (monitor == "on")
    assert len(figures[0]) == 12
    assert figures[0] == figures[1]


def _train_with_a_slow_rank(world: World, job: TrainingJob) -> TrainingResult:
    """All ranks take their time, and one takes twice as much."""
    original = Decoder.forward

    def forward(self: Decoder, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2 if world.rank == SLOW_RANK else 0.1)
        return original(self, *args, **kwargs)

    Decoder.forward = forward  # type: ignore[method-assign]
    try:
        return train_job(world, job)
    finally:
        Decoder.forward = original  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_slow_rank_is_named_with_its_cost(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    job = _job(
        tmp_path,
        "slow",
        "auto",
        layout={},
        steps=120,
        micro_batch_size=4,
        checkpoint={"every_steps": 0},
        validation={"every_steps": 0},
    )
    profile = tmp_path / "sweep.json"
    profile.write_text(json.dumps(swept(FakeCollectives(), world_group(2)).as_data()))
    job = replace(job, fabric=job.fabric.model_copy(update={"profile": str(profile)}))
    prepared(job)
    gloo_ranks(2, _train_with_a_slow_rank, job, timeout_s=180.0)
    windows = _lines(job.run_directory / "fabric" / "windows.jsonl")
    assert len(windows) >= 3
    assert all(window["late_s"]["1"] > window["late_s"]["0"] for window in windows)
    findings = [
        finding for finding in _lines(job.run_directory / "fabric" / "findings.jsonl") if finding["kind"] == "slow_host"
    ]
    (found,) = findings
    assert found["ranks"] == [SLOW_RANK]
    assert 0.05 < found["evidence"]["cost_s_per_step"] < 0.3
    assert found["sentence"].startswith(f"rank {SLOW_RANK} on ")
    events = _lines(job.run_directory / "events.jsonl")
    assert found["sentence"] in [event["sentence"] for event in events if event["event"] == "fabric_finding"]
    (expected,) = [event for event in events if event["event"] == "communication_time"]
    assert {(row["axis"], row["kind"]) for row in expected["rows"] if row["share"] is not None} >= {
        ("world", "all_reduce")
    }
    assert expected["message"].startswith("communication of a step: ")
    scalars = b"".join(path.read_bytes() for path in (job.run_directory / "tensorboard").glob("*"))
    assert b"fabric/world/wait_s" in scalars
    assert b"fabric/late_s/rank-1" in scalars


def test_ranks_that_are_watched_differently_are_told_before_they_wait(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    job = _job(tmp_path, "uneven", "on", layout={})
    prepared(job)
    with pytest.raises(AssertionError, match=r"fabric\.monitor is 'off' on rank 1 and 'on' on rank 0"):
        gloo_ranks(2, _train_unevenly, job)


def _train_unevenly(world: World, job: TrainingJob) -> TrainingResult:
    return train_job(world, replace(job, fabric=FabricConfig(monitor="off")) if world.rank == 1 else job)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
