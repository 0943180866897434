"""What building a model refuses, and what it says of settings that do nothing."""

from __future__ import annotations

from typing import Any

import pytest

from megamodel.errors import RefusedError
from megamodel.train.build import BuiltModel, build_model
from megamodel.train.config import TrainConfig
from parallel.config import ParallelConfig
from parallel.layout import resolve_layout
from parallel.mesh import Mesh
from parallel.placement import piece_of
from parallel.world import World
from tests.gloo_pool import GlooPool
from tests.megamodel.small import MOE, small_config


def built(world: World, parallel: dict[str, Any], train: dict[str, Any] | None = None, **model: Any) -> BuiltModel:
    config = ParallelConfig(**parallel)
    settings = TrainConfig(**{"precision": "fp32", "compile": "off", "global_batch_size": 8, **(train or {})})
    mesh = Mesh(world, resolve_layout(config, world.world_size))
    return build_model(small_config(**model), settings, config, mesh=mesh, seed=1, seq_len=16)


def notices(world: World) -> list[str | None]:
    recompute = {"activation_memory": {"mode": "full"}, "micro_batch_size": 1}
    return [
        built(world, {"tp": 2, "data_engine": "fsdp2", "cpu_offload": True}).notice,
        built(world, {"pp": 2, "pipeline_schedule": "zbv"}, recompute, num_layers=4).notice,
        built(world, {"pp": 2, "pipeline_schedule": "zbv"}, {"micro_batch_size": 1}, num_layers=4).notice,
        built(world, {"data_engine": "fsdp2", "cpu_offload": True}).notice,
    ]


def test_settings_that_do_nothing_are_told(gloo_ranks: GlooPool) -> None:
    offload, schedule, *silent = gloo_ranks(2, notices)[0]
    assert offload == "parallel.cpu_offload does nothing: no rank shares its part of the model with another"
    assert schedule is not None
    assert "ranks wait as under interleaved_1f1b" in schedule
    assert silent == [None, None]


def overlapped(world: World) -> None:
    with pytest.raises(
        RefusedError, match=r"async_tp = true: needs CUDA and torch.compile, and this run is on the cpu"
    ):
        built(world, {"tp": 2, "async_tp": True})


def test_overlap_that_cannot_be_is_refused(gloo_ranks: GlooPool) -> None:
    gloo_ranks(2, overlapped)


def largest_shares(world: World) -> list[int]:
    """Numbers of experts' parameters on this rank, and of each the dim along which it is sharded."""
    model = built(world, {"data_engine": "fsdp2"}, moe={**MOE, "num_experts": 2})
    experts = [placed for placed in model.data_parallel.parameters() if ".experts." in placed.name]
    return [sum(piece_of(placed.parameter, placed.placement).local.numel() for placed in experts)]


def test_few_experts_are_shared_out_over_many_ranks(gloo_ranks: GlooPool) -> None:
    shares = gloo_ranks(4, largest_shares)
    assert len({share for (share,) in shares}) == 1, shares
