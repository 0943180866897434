"""Activation modes under every way to spread a model: the same gradients, bit for bit, as keeping everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megamodel.train.batch import TokenBatch
from megamodel.train.build import build_model
from megamodel.train.config import TrainConfig
from parallel.config import ParallelConfig
from parallel.layout import resolve_layout
from parallel.mesh import Mesh
from parallel.world import World
from tests.gloo_pool import GlooPool
from tests.megamodel.small import MOE, random_tokens, small_config

ROWS, SEQ = 8, 32


def gradients(world: World, parallel: dict[str, Any], memory: dict[str, Any]) -> dict[str, Tensor]:
    """Of this rank's parts of parameters, after all micro batches of a step."""
    model = small_config(num_layers=4, vocab_size=96, moe={**MOE, "first_layer": 1, "num_shared_experts": 1})
    config = ParallelConfig(**parallel)
    mesh = Mesh(world, resolve_layout(config, world.world_size))
    train = TrainConfig(
        global_batch_size=ROWS, micro_batch_size=2, precision="fp32", compile="off", activation_memory=memory
    )
    built = build_model(model, train, config, mesh=mesh, seed=0, seq_len=SEQ)
    tokens = random_tokens(model, ROWS, SEQ + 1)
    share = ROWS // mesh.layout.num_data_ranks
    batch = TokenBatch(tokens_BS=tokens[:, :-1], labels_BS=tokens[:, 1:], document_ids_BS=None)
    own = batch.rows(slice(mesh.data_rank * share, (mesh.data_rank + 1) * share)).share(mesh.axis("cp"))
    built.passes.train([own.rows(slice(first, first + 2)) for first in range(0, share, 2)], 1.0)
    found = {}
    for placed in built.data_parallel.parameters():
        grad = placed.parameter.grad
        assert grad is not None, placed.name
        found[placed.name] = getattr(grad, "_local_tensor", grad).clone()
    return found


def differing(world: World, parallel: dict[str, Any]) -> list[tuple[str, str]]:
    """Modes and parameters whose gradients are not those of keeping everything."""
    expected = gradients(world, parallel, {"mode": "none"})
    return [
        (mode, name)
        for mode in ("selective", "full", "offload")
        for name, grad in gradients(world, parallel, {"mode": mode}).items()
        if not torch.equal(grad, expected[name])
    ]


@pytest.mark.parametrize(
    "parallel",
    [
        {"data_engine": "fsdp2", "ep": 2},
        {"tp": 2, "ep": 2},
        {"cp": 2},
        {"cp": 2, "context_method": "ring"},
        {"pp": 2, "pipeline_schedule": "zbv"},
    ],
    ids=str,
)
def test_gradients_are_equal(gloo_ranks: GlooPool, parallel: dict[str, Any]) -> None:
    assert gloo_ranks(2, differing, parallel) == [[], []]
