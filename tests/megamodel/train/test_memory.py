"""The formula of a rank's memory against what a step takes, and against the parameters that a rank builds."""

from __future__ import annotations

from typing import Any

import pytest

from megamodel.model.config import ModelConfig
from megamodel.train.communication_facts import RunShape
from megamodel.train.config import TrainConfig
from megamodel.train.memory import in_flight, predict_memory, report_activations
from megamodel.train.memory_measurement import measure_step
from parallel.config import ParallelConfig
from parallel.layout import Layout, resolve_layout
from parallel.mesh import Mesh
from parallel.world import World, open_world
from tests.gloo_pool import GlooPool
from tests.megamodel.small import small_config

SEQ = 64


def model_of(kind: str) -> ModelConfig:
    moe = {"num_experts": 4, "top_k": 2, "d_ff": 96, "num_shared_experts": 1} if kind == "moe" else None
    return small_config(
        num_layers=4, d_model=96, num_heads=4, num_kv_heads=2, head_dim=24, d_ff=256, vocab_size=512, moe=moe
    )


def settings(**train: Any) -> TrainConfig:
    return TrainConfig(**{"global_batch_size": 8, "precision": "fp32", "compile": "off", **train})


def measured(world: World, kind: str, train: dict[str, Any], parallel: dict[str, Any]) -> tuple[float, int, int]:
    """Measured over predicted; the optimizer's state, measured and predicted."""
    config = ParallelConfig(**parallel)
    mesh = Mesh(world, resolve_layout(config, world.world_size))
    step = measure_step(model_of(kind), settings(**train), config, mesh=mesh, seq_len=SEQ)
    return step.ratio, step.peak.by_kind["optimizer"], step.predicted.optimizer


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("dense", {}, {}),
    "bf16 MoE": ("moe", {"precision": "bf16"}, {}),
    "accumulation": ("dense", {"micro_batch_size": 2}, {}),
    "muon": ("dense", {"optimizer": {"name": "muon"}}, {}),
    "selective": ("dense", {"activation_memory": {"mode": "selective"}}, {}),
    "full": ("moe", {"activation_memory": {"mode": "full"}}, {}),
    "offload": ("dense", {"activation_memory": {"mode": "offload"}}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_one_rank(name: str) -> None:
    kind, train, parallel = CASES[name]
    with open_world(device="cpu") as world:
        ratio, optimizer, predicted = measured(world, kind, train, parallel)
    assert 1 / 1.15 <= ratio <= 1.10
    assert optimizer == pytest.approx(predicted, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "train", "parallel"),
    [
        ("dense", {}, {"data_engine": "ddp"}),
        ("dense", {"precision": "bf16"}, {"data_engine": "fsdp2"}),
        ("dense", {"micro_batch_size": 2}, {"data_engine": "fsdp2", "reshard_after_forward": False}),
        ("dense", {"activation_memory": {"mode": "full"}}, {"tp": 2}),
        ("moe", {}, {"ep": 2}),
        ("dense", {"micro_batch_size": 2}, {"pp": 2}),
    ],
    ids=str,
)
def test_two_ranks(gloo_ranks: GlooPool, kind: str, train: dict[str, Any], parallel: dict[str, Any]) -> None:
    for ratio, optimizer, predicted in gloo_ranks(2, measured, kind, train, parallel):
        assert 1 / 1.15 <= ratio <= 1.15
        assert optimizer == pytest.approx(predicted, rel=0.01)


def shape_of(train: dict[str, Any], parallel: dict[str, Any], layout: Layout) -> RunShape:
    return RunShape(
        model=model_of("dense"),
        layout=layout,
        parallel=ParallelConfig(**parallel),
        train=settings(**train),
        seq_len=SEQ,
        rows=1,
        document_mask=False,
    )


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("gpipe", [8, 8]),
        ("1f1b", [2, 1]),
        ("interleaved_1f1b", [2.5, 1.5]),
        ("interleaved_zero_bubble", [2, 1.5]),
        ("zbv", [2, 2]),
        ("dualpipev", [2.5, 2.5]),
    ],
)
def test_micro_batches_in_flight(schedule: str, expected: list[float]) -> None:
    shape = shape_of({}, {"pp": 2, "pipeline_schedule": schedule}, Layout(pp=2))
    assert [in_flight(shape, rank) for rank in range(2)] == expected


def test_each_mode_keeps_less_than_the_one_before() -> None:
    kept = []
    for mode in ("none", "selective", "full", "offload"):
        report = report_activations(shape_of({"activation_memory": {"mode": mode}}, {}, Layout()))
        assert report.mode == mode
        kept.append(report.kept)
        assert report.kept + report.saved == kept[0]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == 0


def test_more_ranks_need_less_each() -> None:
    peaks = [
        predict_memory(shape_of({}, {"data_engine": "fsdp2", **parallel}, layout)).peak
        for parallel, layout in (
            ({}, Layout()),
            ({}, Layout(dp_shard=2)),
            ({"tp": 2}, Layout(dp_shard=2, tp=2)),
            ({"pp": 2, "tp": 2}, Layout(pp=2, dp_shard=2, tp=2)),
        )
    ]
    assert peaks[1] < peaks[0]
    assert peaks[2] < peaks[1]
