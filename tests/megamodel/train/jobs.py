"""Small training jobs on text that the test makes: seconds, not minutes."""

from __future__ import annotations

import io
import math
import random
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.config import FabricConfig
from data_pipeline.config import DataConfig
from data_pipeline.prepare import prepare
from data_pipeline.prepared import PreparedData
from megamodel.model.decoder import Decoder, LossTerms
from megamodel.train.config import TrainConfig
from megamodel.train.job import TrainingJob, TrainingResult
from megamodel.train.run import train_in_world
from megamodel.train.run_directory import RunDirectory
from parallel.config import ParallelConfig
from parallel.world import World
from tests.megamodel.small import MOE, small_config

_WORDS = [
    "the",
    "rank",
    "and",
    "a",
    "gate",
    "of",
    "many",
    "small",
    "experts",
    "learn",
    "where",
    "each",
    "token",
    "goes",
    "while",
    "no",
    "one",
    "waits",
    "for",
    "long",
]


def write_corpus(folder: Path) -> Path:
    """Forty files of a few hundred words."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    for number in range(40):
        words = generator.choices(_WORDS, k=generator.randint(100, 300))
        (folder / f"{number:02d}.txt").write_text(" ".join(words))
    return folder


def small_job(
    root: Path, *, name: str = "run", engine: str = "ddp", model: dict[str, Any] | None = None, **train: Any
) -> TrainingJob:
    """Twelve steps of eight samples of 32 tokens, fp32, two layers of which one is MoE; `train` replaces settings."""
    corpus = root / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    data = DataConfig(
        source="text",
        path=str(corpus),
        cache_directory=str(root / "cache"),
        seq_len=32,
        held_out_fraction=0.1,
        tokenizer={"vocab_size": 280},
    )
    settings: dict[str, Any] = {
        "steps": 12,
        "global_batch_size": 8,
        "precision": "fp32",
        "compile": "off",
        "optimizer": {"name": "muon", "lr": 3e-3},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"every_steps": 4},
        "validation": {"every_steps": 6},
    }
    fields = {"vocab_size": 288, "init_std": 0.05, "moe": {**MOE, "first_layer": 1}, **(model or {})}
    return TrainingJob(
        run_directory=root / "runs" / name,
        seed=7,
        device="cpu",
        model=small_config(**fields),
        data=data,
        parallel=ParallelConfig(data_engine=engine, timeout_seconds=30),
        train=TrainConfig(**{**settings, **train}),
        fabric=FabricConfig(monitor="off"),  # a process more for each of hundreds of runs
    )


def prepared(job: TrainingJob) -> PreparedData:
    """Its data, built by whoever asks first."""
    return prepare(job.data)


def train_job(world: World, job: TrainingJob) -> TrainingResult:
    """Runs on each rank of a pool."""
    return train_in_world(job, prepared(job), world, console=Console(file=io.StringIO()))


def step_lines(job: TrainingJob) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are steps."""
    return [line for line in RunDirectory(job.run_directory).read_metrics() if "loss" in line]


def losses(job: TrainingJob) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of each step, in full precision."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in step_lines(job)]


def train_poisoned(world: World, job: TrainingJob) -> TrainingResult:
    """As `train_job`, but every loss is NaN."""
    original = Decoder.forward

    def poisoned(self: Decoder, *args: Any, **kwargs: Any) -> LossTerms:
        terms: LossTerms = original(self, *args, **kwargs)
        return terms._replace(token_loss_sum=terms.token_loss_sum * math.nan)

    Decoder.forward = poisoned  # type: ignore[method-assign]
    try:
        return train_job(world, job)
    finally:
        Decoder.forward = original  # type: ignore[method-assign]
