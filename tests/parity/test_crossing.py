"""A run that stops under any layout goes on under any other: the losses and norms of a run that never stopped, and every
sample once.

Each run goes the whole way of a real one: prepared data, loader, checkpoints, records.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline.batches import Batch, BatchLoader
from data_pipeline.dataset import PackedDataset
from data_pipeline.order import samples_at
from megamodel.train import trainer
from megamodel.train.job import TrainingJob
from parallel.config import ParallelConfig
from parallel.world import World
from tests.gloo_pool import GlooPool
from tests.megamodel.train.jobs import losses, prepared, small_job, train_job
from tests.requirements import missing, requires

BATCH = 4
SAVED_AFTER = 3
STEPS = 5
TOLERANCE = 1e-5

FSDP = {"data_engine": "fsdp2"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ddp2": (2, {"dp_shard": 2}),
    "hsdp2x2": (4, {"dp_replicate": 2, "dp_shard": 2, **FSDP}),
    "tp4": (4, {"tp": 4}),
    "tp2-fsdp2": (4, {"tp": 2, "dp_shard": 2, **FSDP}),
    "cp2-ring-ep2": (2, {"cp": 2, "ep": 2, "context_method": "ring"}),
    "pp2-interleaved": (2, {"pp": 2, "pipeline_schedule": "interleaved_1f1b"}),
    "pp2-zbv-tp2": (4, {"pp": 2, "tp": 2, "pipeline_schedule": "zbv"}),
    "zero3x2": (2, {"data_engine": "deepspeed", "deepspeed": {"zero_stage": 3}}),
    "tp2-cp2-fsdp2-ep4-expert_tp2": (8, {"tp": 2, "cp": 2, "dp_shard": 2, "ep": 4, "expert_tp": 2, **FSDP}),
}
"""Ranks and `[parallel]`. tp 4 copies the two kv heads."""
NEEDS_DEEPSPEED = {"zero3x2"}
SOURCES = [layout for layout in LAYOUTS if layout not in NEEDS_DEEPSPEED or missing("deepspeed") is None]
MODEL = {
    "num_layers": 4,
    "d_ff": 64,
    "moe": {
        "num_experts": 4,
        "top_k": 2,
        "d_ff": 32,
        "num_shared_experts": 1,
        "every": 2,
        "balance": "bias",  # a buffer, which crosses beside the parameters
        "router_score": "sigmoid",
    },
}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one rank was given: its share of each global batch."""

    dp_rank: int
    dp_size: int
    batches: list[NDArray[np.int64]]
    """Tokens [rows, seq_len] of each step."""


def train_and_watch(world: World, jobs: list[TrainingJob]) -> list[Seen]:
    """Runs one job after another on the same ranks."""
    return [_train_and_watch(world, job) for job in jobs]


def _train_and_watch(world: World, job: TrainingJob) -> Seen:
    loaders: list[_WatchedLoader] = []

    def watched(*args: Any, **settings: Any) -> _WatchedLoader:
        loaders.append(_WatchedLoader(*args, **settings))
        return loaders[-1]

    trainer.BatchLoader = watched  # type: ignore[assignment,misc]
    try:
        train_job(world, job)
    finally:
        trainer.BatchLoader = BatchLoader  # type: ignore[misc]
    (loader,) = loaders
    return Seen(dp_rank=loader.dp_rank, dp_size=loader.dp_size, batches=loader.handed_out)


class _WatchedLoader(BatchLoader):
    """Remembers what it hands out; what it reads ahead of that, nobody trains on."""

    def __init__(self, *args: Any, dp_rank: int, dp_size: int, **settings: Any) -> None:
        super().__init__(*args, dp_rank=dp_rank, dp_size=dp_size, **settings)
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.handed_out: list[NDArray[np.int64]] = []

    def __next__(self) -> Batch:
        batch = super().__next__()
        self.handed_out.append(batch.tokens_BS.copy())
        return batch


@dataclass(frozen=True, kw_only=True)
class Runs:
    """One run that never stopped, and for each layout one that stopped half-way."""

    root: Path
    figures: list[tuple[int, float, float]]
    samples: dict[bytes, int]
    """The index of each row of the training set."""
    order: list[list[int]]
    """The samples of each step."""
    seen: dict[str, list[list[int]]]
    """Those that each stopped run was given."""


def _job(root: Path, layout: str, *, name: str, steps: int = STEPS) -> TrainingJob:
    job = small_job(
        root,
        name=name,
        model=MODEL,
        steps=steps,
        global_batch_size=BATCH,
        optimizer={"lr": 3e-3, "eps": 1e-5},
        schedule={"name": "constant", "warmup_steps": 2},
        checkpoint={"every_steps": 0},
        log={"tensorboard": False},
    )
    _, parallel = LAYOUTS[layout]
    data = job.data.model_copy(update={"held_out_fraction": 0.0})
    return replace(job, data=data, parallel=ParallelConfig(**parallel, timeout_seconds=60))


def _samples_of_steps(seen_by_rank: list[Seen], samples: dict[bytes, int]) -> list[list[int]]:
    """The global batch of each step, put together from the shares of the data ranks."""
    shares = {seen.dp_rank: seen for seen in seen_by_rank}
    assert sorted(shares) == list(range(seen_by_rank[0].dp_size))
    for seen in seen_by_rank:  # ranks that share rows must have been given the same ones
        same = shares[seen.dp_rank]
        assert seen.dp_size == same.dp_size
        assert all(np.array_equal(mine, other) for mine, other in zip(seen.batches, same.batches, strict=True))
    return [
        [samples[row.tobytes()] for rank in sorted(shares) for row in shares[rank].batches[step]]
        for step in range(len(seen_by_rank[0].batches))
    ]


@pytest.fixture(scope="module")
def runs(gloo_ranks: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("crossing")
    whole = _job(root, "one", name="whole")
    data = prepared(whole)
    train = PackedDataset(data, "train", whole.data.seq_len)
    samples = {train[index].tokens_S.tobytes(): index for index in range(len(train))}
    assert len(samples) == len(train) >= BATCH * STEPS  # each row is unlike all others, and comes once
    positions = np.arange(BATCH * STEPS)
    order = samples_at(positions, seed=whole.seed, num_samples=len(train), manifest_hash=data.manifest_hash)
    gloo_ranks(1, train_job, whole)
    seen = {}
    for layout in SOURCES:
        stopped = _job(root, layout, name=layout, steps=SAVED_AFTER)
        watched = gloo_ranks(LAYOUTS[layout][0], train_and_watch, [stopped], timeout_s=300.0)
        seen[layout] = _samples_of_steps([rank[0] for rank in watched], samples)
    return Runs(
        root=root, figures=losses(whole), samples=samples, order=order.reshape(STEPS, BATCH).tolist(), seen=seen
    )


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=requires("deepspeed") if name in NEEDS_DEEPSPEED else ()) for name in LAYOUTS]
)
def test_what_any_layout_saved_goes_on_here(gloo_ranks: GlooPool, runs: Runs, target: str) -> None:
    jobs = {source: _job(runs.root, target, name=f"{source}-to-{target}") for source in SOURCES}
    for source, job in jobs.items():
        shutil.copytree(runs.root / "runs" / source, job.run_directory, symlinks=True)
    watched = gloo_ranks(LAYOUTS[target][0], train_and_watch, list(jobs.values()), timeout_s=400.0)
    problems = []
    for number, (source, job) in enumerate(jobs.items()):
        problems += [f"from {source}: {problem}" for problem in _deviations(losses(job), runs.figures)]
        steps = runs.seen[source] + _samples_of_steps([rank[number] for rank in watched], runs.samples)
        assert [sorted(step) for step in steps] == [sorted(step) for step in runs.order], source
        given = [sample for step in steps for sample in step]
        assert len(set(given)) == len(given) == BATCH * STEPS, source
    assert not problems, "\n".join(problems)


def _deviations(found: list[tuple[int, float, float]], expected: list[tuple[int, float, float]]) -> list[str]:
    """Steps whose loss or gradient norm is not that of the run on one rank that never stopped."""
    assert [step for step, _, _ in found] == [step for step, _, _ in expected] == list(range(1, STEPS + 1))
    return [
        f"{kind} of step {here[0]}: {here[column]!r}, without a stop {there[column]!r}"
        for here, there in zip(found, expected, strict=True)
        for kind, column in (("loss", 1), ("gradient norm", 2))
        if not abs(here[column] - there[column]) <= TOLERANCE * abs(there[column])
    ]
