"""Norms and routers compute with float32 weights under either engine, whatever the precision of the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megamodel.model.config import ModelConfig
from megamodel.model.decoder import Decoder
from megamodel.model.moe import Router
from megamodel.train.build import materialize
from megamodel.train.sharding_plan import is_full_precision, is_gathered_unit
from parallel.data_parallel import DataParallel, Units, wrap
from parallel.world import World
from tests.gloo_pool import GlooPool
from tests.megamodel.small import MLA, MOE, random_tokens, small_config
from tests.parallel.models import flat_mesh

CONFIG = small_config(qk_norm=True, moe={**MOE, "first_layer": 1, "z_loss_weight": 0.01, "aux_loss_weight": 0.1})
CPU = torch.device("cpu")


def is_small(module: nn.Module) -> bool:
    return isinstance(module, (nn.RMSNorm, Router))


@pytest.mark.parametrize("config", [CONFIG, small_config(mla=MLA, moe=MOE)])
def test_the_plan_names_every_norm_and_router_and_nothing_else(config: ModelConfig) -> None:
    with torch.device("meta"):
        decoder = Decoder(config)
    for name, module in decoder.named_modules():
        assert is_full_precision(name, module) == is_small(module), name


def wrapped(world: World, engine: Any, precision: torch.dtype) -> DataParallel:
    with torch.device("meta"):
        decoder = Decoder(CONFIG)
    decoder.compute_dtype = precision
    sharded = engine == "fsdp2"
    if not sharded:
        materialize([decoder], CPU, CONFIG, 3, {})
    parallel = wrap(
        [decoder],
        mesh=flat_mesh(world),
        placements={},
        engine=engine,
        units=Units(is_unit=is_gathered_unit, is_full_precision=is_full_precision),
        param_dtype=precision if sharded and precision != torch.float32 else None,
    )
    if sharded:
        materialize([decoder], CPU, CONFIG, 3, {})
    return parallel


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def two_micro_steps(world: World, engine: str, precision: torch.dtype) -> dict[str, Any]:
    """Types of the weights that small modules and others see, and gradients and norm of two micro steps."""
    parallel = wrapped(world, engine, precision)
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for module in parallel.model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(
                lambda module, _: seen[is_small(module)].update(p.dtype for p in module.parameters(recurse=False))
            )
    tokens = random_tokens(CONFIG, 8, 17, seed=world.rank)
    for index, rows in enumerate(tokens.chunk(2)):
        with parallel.micro_step(is_last=index == 1):
            terms = parallel.module(rows[:, :-1], rows[:, 1:])
            ((terms.token_loss_sum + terms.router_loss_sum) / tokens.numel()).backward()
    gradients = {name: whole(p.grad) for name, p in parallel.model.named_parameters() if p.grad is not None}
    norm = parallel.clip_grad_norm(1e-3)
    return {
        "seen": seen,
        "gradients": gradients,
        "norm": norm.item(),
        "clipped": parallel.clip_grad_norm(float("inf")).item(),
        "types": {p.dtype for p in parallel.model.parameters()},
        "plain": {name for name, p in parallel.model.named_parameters() if not isinstance(p, DTensor)},
    }


@pytest.mark.parametrize("ranks", [2, 3])
def test_in_bf16_both_engines_agree(gloo_ranks: GlooPool, ranks: int) -> None:
    expected = gloo_ranks(ranks, two_micro_steps, "ddp", torch.bfloat16)[0]
    for found in gloo_ranks(ranks, two_micro_steps, "fsdp2", torch.bfloat16):
        assert found["seen"] == {True: {torch.float32}, False: {torch.bfloat16}}
        assert found["types"] == {torch.float32}
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            error = (found["gradients"][name] - gradient).norm() / gradient.norm()
            # Weights are the same bits; gradients of matrices are rounded to bf16 before their sum under FSDP2.
            assert error <= (1e-5 if is_small_name(name) else 1e-2), f"{name}: {error:.1e}"
        assert found["norm"] == pytest.approx(expected["norm"], rel=1e-3)
        assert found["clipped"] == pytest.approx(1e-3, rel=1e-3)
        assert found["plain"] == {name for name in found["gradients"] if is_small_name(name)}


def is_small_name(name: str) -> bool:
    return name.endswith(("norm.weight", "router.weight"))


def test_in_float32_nothing_is_left_out_of_sharding(gloo_ranks: GlooPool) -> None:
    expected = gloo_ranks(2, two_micro_steps, "ddp", torch.float32)[0]
    for found in gloo_ranks(2, two_micro_steps, "fsdp2", torch.float32):
        assert found["plain"] == set()
        assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-7, msg=name)
