"""Every schedule against one process: the loss, every gradient, and what one step leaves behind for the next."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.collectives import all_reduce
from parallel.errors import ParallelError
from parallel.layout import Layout
from parallel.mesh import Axis, single_axis
from parallel.pipeline import Pipeline, PipelineTimes, StagePart, check_schedule
from parallel.stages import stages_of_rank
from parallel.world import World
from tests.gloo_pool import GlooPool
from tests.parallel.pipelines import NUM_LAYERS, B, Case, D, Part, S, batch, bounds, make

SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]


@dataclass
class Record:
    """Two steps with an evaluation before each, as one rank saw them, or one process."""

    gradients: list[dict[str, Tensor]]
    losses: list[float]
    evaluated: list[float]
    reductions: list[int]


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def update(module: nn.Module, tp: Axis) -> dict[str, Tensor]:
    """One step of gradient descent; returns the gradients it used. Ranks of `tp` have the parts of their tokens."""
    gradients = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        if tp.is_split:
            parameter.grad = all_reduce(parameter.grad, tp)
        gradients[name] = whole(parameter.grad)
        parameter.data.add_(parameter.grad, alpha=-0.02)
        parameter.grad = None
    return gradients


def run(world: World, case: Case, layout: Layout) -> Record:
    made = make(world, case, layout)
    data_rank = made.mesh.coordinate("dp_replicate") * layout.dp_shard + made.mesh.coordinate("dp_shard")
    record = Record([], [], [], [])
    for step in range(2):
        tokens, labels = batch(step + 10, data_rank, 2)
        with torch.no_grad():
            for tokens_BS, labels_BS in zip(tokens, labels, strict=True):
                made.pipeline.evaluate(tokens_BS, {"labels_BS": labels_BS})
        record.evaluated.append(float(sum(made.losses)))
        made.losses.clear()
        tokens, labels = batch(step, data_rank, case.num_micro_batches)
        with Reductions() as seen:
            made.pipeline.train(tokens, [{"labels_BS": labels_BS} for labels_BS in labels])
        record.reductions.append(seen.count)
        record.losses.append(float(sum(made.losses)))
        made.losses.clear()
        record.gradients.append({name: grad for part in made.parts for name, grad in update(part, part.tp).items()})
    return record


class Reductions(TorchDispatchMode):
    """Counts FSDP2's reductions of gradients."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "c10d::" in func.name() and "reduce_scatter" in func.name()
        return func(*args, **(kwargs or {}))


def alone(case: Case, num_data_ranks: int = 1) -> Record:
    """The same by one process that has all layers and all data."""
    net = Part(0, NUM_LAYERS, single_axis("tp"), False)
    record = Record([], [], [], [])
    for step in range(2):
        for seed, count, sums in ((step + 10, 2, record.evaluated), (step, case.num_micro_batches, record.losses)):
            net.zero_grad()
            total = 0.0
            for data_rank in range(num_data_ranks):
                for tokens_BS, labels_BS in zip(*batch(seed, data_rank, count), strict=True):
                    loss = net(tokens_BS, labels_BS)
                    loss.backward()
                    total += loss.item()
            sums.append(total)
        record.gradients.append(update(net, net.tp))
    return record


def check(found: list[Record], expected: Record) -> None:
    """Every gradient of the whole is on some rank, and each is right; the ranks' losses make up the whole."""
    for step in range(2):
        seen = set()
        for record in found:
            for name, gradient in record.gradients[step].items():
                error = (gradient - expected.gradients[step][name]).norm()
                relative = error / expected.gradients[step][name].norm()
                assert relative <= 1e-6, f"step {step}, {name}: relative error {relative:.1e}"
                seen.add(name)
        assert seen == expected.gradients[step].keys()
        assert sum(record.losses[step] for record in found) == pytest.approx(expected.losses[step], rel=1e-6)
        assert sum(record.evaluated[step] for record in found) == pytest.approx(expected.evaluated[step], rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_ranks_are_one_process(gloo_ranks: GlooPool, schedule: str) -> None:
    case = Case(schedule=schedule)
    check(gloo_ranks(2, run, case, Layout(pp=2)), alone(case))


@pytest.mark.parametrize(
    "case",
    [
        Case(schedule="1f1b", num_micro_batches=2),
        Case(schedule="gpipe", num_micro_batches=1),
        Case(schedule="interleaved_1f1b", stages_per_rank=3),
        Case(schedule="interleaved_zero_bubble", stages_per_rank=4, num_micro_batches=4),
        Case(schedule="zbv", num_micro_batches=1),
        Case(schedule="dualpipev", num_micro_batches=7, split_backward=False),
        Case(schedule="interleaved_zero_bubble", recompute=True),
    ],
    ids=str,
)
def test_few_micro_batches_more_stages_and_whole_backwards(gloo_ranks: GlooPool, case: Case) -> None:
    check(gloo_ranks(2, run, case, Layout(pp=2)), alone(case))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv", "dualpipev"])
def test_four_ranks_are_one_process(gloo_ranks: GlooPool, schedule: str) -> None:
    case = Case(schedule=schedule, pp=4, num_micro_batches=8)
    check(gloo_ranks(4, run, case, Layout(pp=4)), alone(case))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"])
def test_stages_may_talk_to_others_in_forward_and_backward(gloo_ranks: GlooPool, schedule: str) -> None:
    case = Case(schedule=schedule, tp=2)
    check(gloo_ranks(4, run, case, Layout(pp=2, tp=2)), alone(case))


@pytest.mark.parametrize(
    ("schedule", "reshard"),
    [(name, True) for name in SCHEDULES] + [("1f1b", False), ("interleaved_zero_bubble", False)],
)
def test_fsdp2_reduces_each_unit_once_a_step(gloo_ranks: GlooPool, schedule: str, reshard: bool) -> None:
    case = Case(schedule=schedule, reshard=reshard, num_micro_batches=4)
    found = gloo_ranks(4, run, case, Layout(pp=2, dp_shard=2))
    check(found, alone(case, num_data_ranks=2))
    cuts = bounds(case.num_stages)
    ends = {0, case.num_stages - 1}
    for rank, record in enumerate(found):
        held = stages_of_rank(rank // 2, 2, case.num_stages, schedule)
        units = sum(cuts[index + 1] - cuts[index] + (index in ends) for index in held)
        assert record.reductions == [units, units]


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_hybrid_sharding(gloo_ranks: GlooPool, schedule: str) -> None:
    case = Case(schedule=schedule, num_micro_batches=4)
    check(gloo_ranks(8, run, case, Layout(pp=2, dp_replicate=2, dp_shard=2)), alone(case, num_data_ranks=4))


def test_fsdp2_adds_up_micro_batches_in_full_precision(gloo_ranks: GlooPool) -> None:
    # One micro batch's gradients are the same numbers under both schedules; only how they are added up might differ.
    cases = [
        Case(schedule=name, param_dtype=torch.bfloat16) for name in ("interleaved_1f1b", "interleaved_zero_bubble")
    ]
    whole_backward, split = (gloo_ranks(4, run, case, Layout(pp=2, dp_shard=2)) for case in cases)
    for one, other in zip(whole_backward, split, strict=True):
        for name, gradient in one.gradients[0].items():
            assert (other.gradients[0][name] - gradient).norm() <= 1e-6 * gradient.norm(), name


@dataclass
class Traces:
    """What many steps leave behind on one rank."""

    tensors: list[int]
    times: PipelineTimes
    gradient_of_frozen: bool
    others_have_gradients: bool


def trained_often(world: World, case: Case) -> Traces:
    made = make(world, case, Layout(pp=2))
    for parameter in made.parts[0].parameters():
        parameter.requires_grad_(False)
    tokens, labels = batch(0, 0, case.num_micro_batches)
    kwargs = [{"labels_BS": labels_BS} for labels_BS in labels]
    counts = []
    for _ in range(4):
        times = made.pipeline.train(tokens if world.rank == 0 else (), kwargs)
        made.losses.clear()
        gc.collect()
        counts.append(sum(isinstance(thing, Tensor) for thing in gc.get_objects()))
    return Traces(
        tensors=counts,
        times=times,
        gradient_of_frozen=any(p.grad is not None for p in made.parts[0].parameters()),
        others_have_gradients=all(p.grad is not None for part in made.parts[1:] for p in part.parameters()),
    )


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved_zero_bubble", "zbv"])
def test_steps_leave_nothing_behind(gloo_ranks: GlooPool, schedule: str) -> None:
    for traces in gloo_ranks(2, trained_often, Case(schedule=schedule)):
        assert len(set(traces.tensors[1:])) == 1, traces.tensors
        assert not traces.gradient_of_frozen
        assert traces.others_have_gradients


def test_the_bubble_is_what_is_left_of_the_time(gloo_ranks: GlooPool) -> None:
    for traces in gloo_ranks(2, trained_often, Case(schedule="1f1b", num_micro_batches=3)):
        assert len(traces.times.spans) == 3 + 3 + 1
        assert 0 < traces.times.compute_s < traces.times.total_s
        assert traces.times.bubble == pytest.approx(1 - traces.times.compute_s / traces.times.total_s)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"schedule": "2f2b"}, 'pipeline_schedule "2f2b" is unknown: use one of gpipe, 1f1b, interleaved_1f1b'),
        (
            {"pp": 1, "num_stages": 1},
            "a pipeline needs 2 ranks or more, and this axis has 1: run the model as one part",
        ),
        ({"num_stages": 4}, "one stage a rank: 4 stages do not fit pp = 2; make 2"),
        ({"schedule": "zbv", "num_stages": 6}, "two stages a rank: 6 stages do not fit pp = 2; make 4"),
        ({"schedule": "interleaved_1f1b", "num_stages": 5}, "5 is no multiple of pp = 2; make 4 or 6"),
        (
            {"num_micro_batches": 1},
            '"1f1b" needs 2 or more micro batches a step with pp = 2, and there are 1: make more',
        ),
        ({"schedule": "dualpipev", "num_stages": 4, "num_micro_batches": 3}, "needs 4 or more micro batches a step"),
        ({"schedule": "interleaved_1f1b", "num_stages": 4, "num_micro_batches": 5}, "multiple of pp, such as 4 or 6"),
        (
            {"schedule": "gpipe", "num_micro_batches": 0},
            "needs 1 or more micro batches a step with pp = 2, and there are 0",
        ),
    ],
)
def test_what_a_schedule_cannot_do_is_refused(wrong: dict[str, Any], told: str) -> None:
    right: dict[str, Any] = {"schedule": "1f1b", "pp": 2, "num_stages": 2, "num_micro_batches": 4}
    check_schedule(**right)
    with pytest.raises(ParallelError) as caught:
        check_schedule(**(right | wrong))
    assert told in str(caught.value)


def refusals(world: World) -> list[str]:
    made = make(world, Case(schedule="1f1b", num_micro_batches=2), Layout(pp=2))
    tokens, labels = batch(0, 0, 2)
    kwargs = [{"labels_BS": labels_BS} for labels_BS in labels]
    messages = []
    with pytest.raises(ParallelError) as caught:
        made.pipeline.train(tokens, kwargs[:1])
    messages.append(str(caught.value))
    if world.rank == 0:  # the other waits for nothing
        with pytest.raises(ParallelError) as caught:
            made.pipeline.evaluate(tokens[0][:1], kwargs[0])
        messages.append(str(caught.value))
    with pytest.raises(ParallelError) as caught:
        Pipeline(
            [StagePart(index=1 - world.rank, module=nn.Identity(), forward=nn.Identity())],
            num_stages=2,
            axis=made.mesh.axis("pp"),
            schedule="1f1b",
            num_micro_batches=2,
            hidden=torch.empty(1),
            device=torch.device("cpu"),
        )
    messages.append(str(caught.value))
    return messages


def test_mistaken_use_is_refused(gloo_ranks: GlooPool) -> None:
    first, last = gloo_ranks(2, refusals)
    assert first[0] == last[0] == "a pipeline of 2 micro batches a step was given 2 inputs and 1 sets of arguments"
    assert first[1] == (
        f"pipeline stage 0 of 2 returned (1, {S}, {D}) torch.float32, and ({B}, {S}, {D}) torch.float32 is agreed: "
        "all micro batches of a pipeline have one shape"
    )
    assert first[2] == 'pipeline_schedule "1f1b": rank 0 of 2 was given the stages [1] of 2, and holds [0]'
