"""Both engines against one process: losses, every gradient, norms, and bits that a restart does not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from parallel.data_parallel import Units, wrap
from parallel.errors import ParallelError
from parallel.world import World
from tests.gloo_pool import GlooPool
from tests.parallel.models import UNITS, WIDTH, Net, build, flat_mesh, global_batch, optimizers_of, train

ENGINES = ["ddp", "fsdp2"]
NO_UNITS = Units(is_unit=lambda name, module: False)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(world: World, engine: Any, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every parameter's gradient after two micro steps over the global batch."""
    parallel = build(world, engine, **options)
    batch = global_batch(0)
    share = batch.view(world.world_size, -1, WIDTH)[world.rank]
    for index, micro_batch in enumerate(share.chunk(2)):
        with parallel.micro_step(is_last=index == 1):
            (parallel.module(micro_batch).pow(2).sum() / len(batch)).backward()
    return {name: whole(p.grad).clone() for name, p in parallel.model.named_parameters() if p.grad is not None}


def alone() -> World:
    from datetime import timedelta

    return World(
        rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), backend=None, timeout=timedelta(seconds=60),
        control_group=None,
    )  # fmt: skip


def trajectory(world: World, engine: Any, options: dict[str, Any]) -> list[tuple[float, float]]:
    parallel = build(world, engine, **options)
    return train(world, parallel, optimizers_of(parallel.model), range(6))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_gradient_is_the_sum_over_ranks(gloo_ranks: GlooPool, engine: str, num_ranks: int) -> None:
    expected = gradients(alone(), engine, {})
    for found in gloo_ranks(num_ranks, gradients, engine, {}):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            error = (found[name] - gradient).norm() / gradient.norm()
            assert error <= 1e-6, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": False}])
@pytest.mark.parametrize("engine", ENGINES)
def test_trajectory_is_that_of_one_process(gloo_ranks: GlooPool, engine: str, options: dict[str, Any]) -> None:
    expected = torch.tensor(trajectory(alone(), engine, {}))
    first, *others = gloo_ranks(3, trajectory, engine, options)
    torch.testing.assert_close(torch.tensor(first), expected, rtol=1e-5, atol=0)
    assert all(other == first for other in others), "ranks disagree on the loss or the norm"


@pytest.mark.parametrize("engine", ENGINES)
def test_low_precision_reduction_is_close_and_not_equal(gloo_ranks: GlooPool, engine: str) -> None:
    expected = gradients(alone(), engine, {})
    found = gloo_ranks(2, gradients, engine, {"reduce_dtype": torch.bfloat16})[0]
    errors = [((found[name] - gradient).norm() / gradient.norm()).item() for name, gradient in expected.items()]
    assert 1e-5 < max(errors) < 2e-2


def test_fsdp2_computes_in_param_dtype_and_keeps_masters(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(2, _dtypes) == [(torch.bfloat16, torch.float32, torch.float32)] * 2


def _dtypes(world: World) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    parallel = build(world, "fsdp2", param_dtype=torch.bfloat16)
    output = parallel.module(global_batch(0).bfloat16())  # the caller casts: see wrap
    output.sum().backward()
    parameter = next(parallel.model.parameters())
    assert parameter.grad is not None
    return output.dtype, parameter.dtype, parameter.grad.dtype


def first_gradients_twice(world: World) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """DDP's gradients of one batch: in its first step after the start, and in its third."""
    # Wide enough that ranks' parts of the ring fall inside a tensor, and used in another order than registered in.
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64) for name in "cab"})
    shell = _InOrder(model)
    parallel = wrap([shell], mesh=flat_mesh(world), placements={}, engine="ddp", units=NO_UNITS)
    x_BD = torch.randn(16, 64, generator=torch.Generator().manual_seed(world.rank))
    taken = []
    for _ in range(3):
        parallel.model.zero_grad()
        with parallel.micro_step(is_last=True):
            parallel.module(x_BD).pow(2).sum().backward()
        taken.append([p.grad.clone() for p in parallel.model.parameters() if p.grad is not None])
    return taken[0], taken[2]


class _InOrder(torch.nn.Module):
    def __init__(self, parts: torch.nn.ModuleDict) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        for name in "abc":
            x_BD = torch.tanh(self.parts[name](x_BD))
        return x_BD


def test_ddp_sums_in_one_order_from_the_first_step_on(gloo_ranks: GlooPool) -> None:
    # A resumed run's first step is a later step of the run that never stopped: their gradients must be the same bits.
    first, third = gloo_ranks(3, first_gradients_twice)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))


def gradient_counts(world: World, engine: Any) -> tuple[bool, bool]:
    """Whether ranks hold different gradients after a micro step that is not the last, and after the last."""
    parallel = build(world, engine)
    differ = []
    for is_last in (False, True):
        with parallel.micro_step(is_last=is_last):
            parallel.module(global_batch(world.rank)).sum().backward()
        total = sum(p.grad.sum() for p in parallel.model.parameters() if p.grad is not None)
        differ.append(len(set(world.all_gather_object(float(total)))) > 1)
    return differ[0], differ[1]


def test_accumulation_communicates_only_in_the_last_micro_step(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(2, gradient_counts, "ddp") == [(True, False)] * 2


def test_infinite_gradients_show_in_the_norm(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(2, _norm_of_infinite_gradients) == [[False, False]] * 2


def _norm_of_infinite_gradients(world: World) -> list[bool]:
    finite = []
    for engine in ENGINES:
        parallel = build(world, engine)
        with parallel.micro_step(is_last=True):
            (parallel.module(global_batch(0)).sum() * (float("inf") if world.rank == 1 else 1.0)).backward()
        finite.append(bool(parallel.clip_grad_norm(1.0).isfinite()))
    return finite


def test_measuring_the_norm_leaves_gradients_alone() -> None:
    parallel = build(alone(), "ddp")
    parallel.module(global_batch(0)).sum().backward()
    before = [p.grad.clone() for p in parallel.model.parameters() if p.grad is not None]
    norm = parallel.clip_grad_norm(float("inf"))
    after = [p.grad for p in parallel.model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    torch.testing.assert_close(norm.float(), torch.cat([gradient.flatten() for gradient in before]).norm())


def refusals(world: World) -> list[str]:
    messages = []
    with torch.device("meta"):
        on_meta = Net()
    for model, options in (
        (Net(), {"engine": "ddp", "units": UNITS, "param_dtype": torch.bfloat16}),
        (on_meta, {"engine": "ddp", "units": UNITS}),
        (Net(), {"engine": "fsdp2", "units": NO_UNITS}),
    ):
        with pytest.raises(ParallelError) as caught:
            wrap([model], mesh=flat_mesh(world), placements={}, **options)
        messages.append(str(caught.value))
    return messages


def test_what_an_engine_cannot_do_is_refused(gloo_ranks: GlooPool) -> None:
    no_dtype, on_meta, no_unit = gloo_ranks(2, refusals)[0]
    assert "no param_dtype" in no_dtype
    assert 'use "fsdp2"' in no_dtype
    assert "on meta" in on_meta
    assert "no module of the model is a unit" in no_unit
