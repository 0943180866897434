"""Muon against torch's own and on stacks and shards; which parameter goes where; the schedules."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from megamodel.train.config import OptimizerConfig, ScheduleConfig
from megamodel.train.muon import Muon, assign_owners, orthogonalize
from megamodel.train.optimizer import build_optimizers
from megamodel.train.schedule import learning_rate_factor
from parallel.gradients import placed_parameters
from parallel.mesh import single_axis
from parallel.world import World
from tests.gloo_pool import GlooPool
from tests.megamodel.small import MOE, build, small_config
from tests.parallel.models import flat_mesh

ALONE = World(
    rank=0,
    world_size=1,
    local_rank=0,
    device=torch.device("cpu"),
    backend=None,
    timeout=timedelta(seconds=10),
    control_group=None,
)


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (32, 32)])
def test_muon_on_matrices_is_torchs(shape: tuple[int, int]) -> None:
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    mine = Muon([ours], **settings, dtype=torch.bfloat16, axis=single_axis("all"))
    reference = torch.optim.Muon([theirs], **settings, adjust_lr_fn="match_rms_adamw")
    start = ours.detach().clone()
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    # Both round to bfloat16 at different places; updates agree to about its precision.
    assert (ours - theirs).norm() / (theirs - start).norm() < 0.03


def test_orthogonalize_brings_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 20, 40), torch.float32))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_a_stack_is_updated_matrix_by_matrix() -> None:
    stack = torch.nn.Parameter(torch.randn(4, 8, 12))
    singles = [torch.nn.Parameter(matrix.detach().clone()) for matrix in stack]
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "dtype": torch.float32, "axis": single_axis("all")}
    stacked, separate = Muon([stack], **settings), Muon(singles, **settings)
    for _ in range(2):
        stack.grad = torch.randn_like(stack)
        for index, single in enumerate(singles):
            single.grad = stack.grad[index].clone()
        stacked.step()
        separate.step()
    torch.testing.assert_close(stack, torch.stack(list(singles)))


def sharded_muon(world: World, shape: tuple[int, ...], placement: int | None) -> bool:
    """The same two steps on a whole parameter and on a sharded one."""
    torch.manual_seed(1)
    start, grads = torch.randn(shape), torch.randn(2, *shape)
    settings = {
        "lr": 0.02,
        "weight_decay": 0.1,
        "momentum": 0.9,
        "dtype": torch.float32,
        "axis": flat_mesh(world).axis("dp_shard", "cp"),
    }
    whole = torch.nn.Parameter(start.clone())
    places = [Replicate() if placement is None else Shard(placement)]
    mesh = flat_mesh(world).device_mesh(("dp_shard", "cp"))
    shards = torch.nn.Parameter(distribute_tensor(start, mesh, places))
    for parameter in (whole, shards):
        optimizer = Muon([parameter], **settings)
        for grad in grads:
            parameter.grad = grad.clone() if parameter is whole else distribute_tensor(grad, mesh, places)
            optimizer.step()
    return torch.allclose(shards.full_tensor(), whole, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "placement"),
    [((8, 12), 0), ((7, 12), 0), ((5, 8, 12), 0), ((1, 8, 12), 0), ((4, 8, 12), 1), ((8, 12), None)],
)
def test_muon_on_shards_equals_muon_on_the_whole(gloo_ranks: GlooPool, shape, placement) -> None:
    assert gloo_ranks(2, sharded_muon, shape, placement) == [True, True]


def dealt_out_muon(world: World) -> tuple[bool, int]:
    """Two steps on parameters that all ranks hold, against one rank alone; and how many this rank worked on."""
    from megamodel.train import muon as module

    generator = torch.Generator().manual_seed(2)
    shapes = [(8, 12), (3, 6, 10), (20, 4), (7, 7)]
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)]
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "dtype": torch.float32}
    results, calls = [], 0
    original = module.orthogonalize

    def counted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(x, dtype)

    axes = (flat_mesh(world).axis("dp_shard", "cp"), single_axis("alone"))
    for place in axes:
        parameters = [torch.nn.Parameter(start.clone()) for start in starts]
        optimizer = Muon(parameters, **settings, axis=place)
        module.orthogonalize = counted if place is axes[0] else original
        for step in grads:
            for parameter, grad in zip(parameters, step, strict=True):
                parameter.grad = grad.clone()
            optimizer.step()
        module.orthogonalize = original
        results.append(parameters)
    return all(torch.equal(ours, alone) for ours, alone in zip(*results, strict=True)), calls


def test_muon_dealt_out_over_ranks_equals_muon_alone(gloo_ranks: GlooPool) -> None:
    answers = gloo_ranks(3, dealt_out_muon)
    assert all(equal for equal, _ in answers)
    # Four matrices and stacks, two steps: dealt out, none twice.
    assert sum(calls for _, calls in answers) == 8
    assert max(calls for _, calls in answers) < 8


def test_owners_share_the_work_evenly() -> None:
    assert assign_owners([5, 4, 3, 2, 1, 1], 2) == [0, 1, 1, 0, 0, 1]
    assert assign_owners([1.0], 4) == [0]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_exactly_one_group(name: str) -> None:
    decoder = build(small_config(qk_norm=True, moe={**MOE, "num_shared_experts": 1, "first_layer": 1}))
    optimizers = build_optimizers(
        placed_parameters([decoder], {}), OptimizerConfig(name=name, weight_decay=0.1), torch.float32, flat_mesh(ALONE)
    )
    seen = [
        (parameter, group["weight_decay"], type(member).__name__)
        for member in optimizers.members
        for group in member.param_groups
        for parameter in group["params"]
    ]
    names = {parameter: key for key, parameter in decoder.named_parameters()}
    assert sorted(names[parameter] for parameter, _, _ in seen) == sorted(names.values())
    for parameter, decay, member in seen:
        key = names[parameter]
        in_block_matrix = parameter.dim() > 1 and key.startswith("layers.") and "router" not in key
        assert (decay > 0) == in_block_matrix, key
        assert member == ("Muon" if name == "muon" and in_block_matrix else "AdamW"), key


def test_the_schedule_moves_every_group_from_its_own_peak() -> None:
    decoder = build(small_config())
    optimizers = build_optimizers(
        placed_parameters([decoder], {}),
        OptimizerConfig(name="muon", lr=1e-3, muon_lr=0.02),
        torch.float32,
        flat_mesh(ALONE),
    )
    for factor in (0.5, 0.25):
        optimizers.step(factor)
        rates = [group["lr"] for member in optimizers.members for group in member.param_groups]
        assert rates == pytest.approx([0.02 * factor, 1e-3 * factor])


def test_schedules() -> None:
    cosine = ScheduleConfig(name="cosine", warmup_steps=10, final_factor=0.1)
    assert [learning_rate_factor(cosine, step, 110) for step in (1, 10, 60, 110)] == pytest.approx([0.1, 1, 0.55, 0.1])
    wsd = ScheduleConfig(name="wsd", warmup_steps=0, decay_fraction=0.2, final_factor=0.0)
    assert [learning_rate_factor(wsd, step, 100) for step in (1, 80, 90, 100)] == pytest.approx([1, 1, 0.5, 0])
    constant = ScheduleConfig(name="constant", warmup_steps=2)
    assert [learning_rate_factor(constant, step, 9) for step in (1, 2, 9)] == [0.5, 1.0, 1.0]


def lone_matrix(world: World) -> bool:
    start, grad = torch.arange(48.0).reshape(6, 8), torch.linspace(-1, 1, 48).reshape(6, 8)
    results = []
    axes = (flat_mesh(world).axis("dp_shard", "cp"), single_axis("alone"))
    for place in axes:
        parameter = torch.nn.Parameter(start.clone())
        parameter.grad = grad.clone()
        Muon([parameter], lr=0.02, momentum=0.9, weight_decay=0.1, dtype=torch.float32, axis=place).step()
        results.append(parameter)
    return torch.equal(*results)


def test_fewer_matrices_than_ranks_are_not_dealt_out(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(3, lone_matrix) == [True] * 3
