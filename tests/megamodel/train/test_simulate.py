"""A simulated rank holds what the formula, and a rank of a real run, say."""

from __future__ import annotations

from typing import Any

import pytest

from megamodel.model.config import ModelConfig
from megamodel.train.build import build_model
from megamodel.train.config import TrainConfig
from megamodel.train.simulate import SimulatedRank, simulate_rank
from parallel.config import ParallelConfig
from parallel.layout import resolve_layout
from parallel.mesh import Mesh
from parallel.world import World
from tests.gloo_pool import GlooPool
from tests.megamodel.small import MLA, MOE, small_config

SEQ = 16


def simulate(
    model: ModelConfig, train: dict[str, Any], parallel: dict[str, Any], world: int, rank: int
) -> SimulatedRank:
    return simulate_rank(
        model,
        TrainConfig(**train),
        ParallelConfig(**parallel),
        seq_len=SEQ,
        world_size=world,
        rank=rank,
        document_mask=False,
        on_cuda=True,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("shape", "parallel", "world"),
    [
        ({"tie_embeddings": True, "qk_norm": True}, {"pp": 2, "tp": 2}, 8),
        ({"num_kv_heads": 1}, {"tp": 4, "dp_replicate": 2}, 16),
        ({"moe": {**MOE, "num_shared_experts": 1}}, {"ep": 4, "pp": 2}, 16),
        ({"moe": MOE}, {"ep": 2, "tp": 2}, 8),
        ({"moe": MOE}, {"ep": 2, "expert_tp": 2}, 8),
        ({"mla": MLA}, {"tp": 2}, 4),
    ],
    ids=str,
)
def test_parameters_are_those_of_the_formula(
    shape: dict[str, Any], parallel: dict[str, Any], world: int, precision: str
) -> None:
    model = small_config(num_layers=4, vocab_size=96, **shape)
    train = {"global_batch_size": 64, "micro_batch_size": 1, "precision": precision}
    for rank in (0, world - 1):
        found = simulate(model, train, {"data_engine": "fsdp2", **parallel}, world, rank)
        if rank == 0:  # it has the largest part of what does not come out even
            assert found.built_parameter_bytes == found.memory.parameters
        assert found.built_parameter_bytes <= found.memory.parameters


def real_bytes(world: World, model: ModelConfig, train: dict[str, Any], parallel: dict[str, Any]) -> int:
    config = ParallelConfig(**parallel)
    mesh = Mesh(world, resolve_layout(config, world.world_size))
    built = build_model(model, TrainConfig(**train, compile="off"), config, mesh=mesh, seed=0, seq_len=SEQ)
    local = [getattr(p.parameter, "_local_tensor", p.parameter) for p in built.data_parallel.parameters()]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def test_a_real_rank_holds_the_same(gloo_ranks: GlooPool) -> None:
    model = small_config(num_layers=4, vocab_size=96)
    train: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 1, "precision": "bf16"}
    parallel = {"data_engine": "fsdp2", "pp": 2}
    real = gloo_ranks(4, real_bytes, model, train, parallel)
    assert [simulate(model, train, parallel, 4, rank).built_parameter_bytes for rank in range(4)] == real


def test_stages_and_place() -> None:
    model = small_config(num_layers=8)
    train = {"global_batch_size": 64, "micro_batch_size": 1}
    parallel = {"data_engine": "fsdp2", "pp": 4, "tp": 2, "pipeline_split": [1, 3, 2, 2]}
    found = simulate(model, train, parallel, 64, 19)
    assert found.layers == (1, 2, 3)
    assert found.coordinates["pp"] == 1
    assert found.coordinates["tp"] == 1
    assert [stage.layers for stage in found.stages] == [(0,), (1, 2, 3), (4, 5), (6, 7)]
    assert found.stages[1].peak == found.memory.peak


def test_engines_that_want_memory_are_simulated_too() -> None:
    model = small_config()
    found = simulate(model, {"global_batch_size": 8}, {"data_engine": "ddp"}, 8, 3)
    assert found.built_parameter_bytes == found.memory.parameters == 4 * found.num_parameters
