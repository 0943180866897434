"""Compiled blocks compute what eager ones compute, in both precisions, dense and MoE."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from megamodel.model.decoder import Seams
from megamodel.model.explicit_attention import ExplicitScores
from megamodel.model.seams import ScaledDotProduct
from megamodel.train.build import _seams, compile_blocks, compute_dtype
from megamodel.train.config import TrainConfig
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.world import World
from tests.megamodel.small import MOE, build, random_tokens, small_config
from tests.requirements import requires

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.slow,
    requires("compiler"),
]


def seams_of(train: TrainConfig, seq_len: int, *, compiled: bool, device: str = "cpu") -> Seams:
    """What plugs into the decoder of one process."""
    world = World(
        rank=0, world_size=1, local_rank=0, device=torch.device(device), backend=None, timeout=timedelta(seconds=10),
        control_group=None,
    )  # fmt: skip
    return _seams(train, ParallelConfig(), seq_len, mesh=Mesh(world, Layout()), compiled=compiled)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_equals_eager(precision: str) -> None:
    config = small_config(init_std=0.1, qk_norm=True, moe={**MOE, "first_layer": 1, "z_loss_weight": 0.01})
    tokens = random_tokens(config, 4, 17)
    documents = (torch.arange(16) >= 9).int().expand(4, -1)
    outcomes = []
    for compiled in (False, True):
        decoder = build(config, seams=seams_of(TrainConfig(), 16, compiled=compiled))
        decoder.compute_dtype = compute_dtype(precision)
        if compiled:
            compile_blocks(decoder)
        terms = decoder(tokens[:, :-1], tokens[:, 1:], documents)
        (terms.token_loss_sum + terms.router_loss_sum).backward()
        outcomes.append((terms, {name: p.grad for name, p in decoder.named_parameters()}))
    (eager, eager_grads), (compiled, compiled_grads) = outcomes
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    assert compiled.token_loss_sum.item() == pytest.approx(eager.token_loss_sum.item(), rel=tolerance)
    assert compiled.router_loss_sum.item() == pytest.approx(eager.router_loss_sum.item(), rel=tolerance)
    for name, grad in eager_grads.items():
        difference = (compiled_grads[name] - grad).norm() / grad.norm()
        assert difference < (1e-4 if precision == "fp32" else 0.1), name


@pytest.mark.parametrize(
    ("choice", "seq_len", "compiled", "expected"),
    [
        ("auto", 256, True, ExplicitScores),
        ("auto", 257, True, ScaledDotProduct),
        ("auto", 256, False, ScaledDotProduct),
        ("sdpa", 64, True, ScaledDotProduct),
        ("explicit", 4096, False, ExplicitScores),
    ],
)
def test_the_choice_of_attention(choice: str, seq_len: int, compiled: bool, expected: type) -> None:
    seams = seams_of(TrainConfig(attention=choice), seq_len, compiled=compiled)
    assert type(seams.attention_core) is expected
    on_cuda = seams_of(TrainConfig(attention="auto"), 64, compiled=True, device="cuda")
    assert type(on_cuda.attention_core) is ScaledDotProduct
