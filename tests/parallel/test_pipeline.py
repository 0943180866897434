"""Every schedule against one process: the loss, every gradient, and what one step leaves behind for the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from parallel.collectives import all_gather, all_reduce, reduce_scatter
from parallel.layout import Layout
from parallel.mesh import Axis, Mesh, single_axis
from parallel.pipeline import Pipeline, StagePart, stages_of_rank
from parallel.world import World
from tests.gloo_pool import GlooPool

# Shape suffixes: B rows of a micro batch, S tokens of a row, D width, T rows * tokens, V vocabulary.
B, S, D, V = 2, 4, 6, 11
SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]
NUM_LAYERS = 9


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layout and one schedule."""

    schedule: str
    pp: int = 2
    num_micro_batches: int = 6
    stages_per_rank: int = 0
    reshard: bool = False
    split_backward: bool = True
    recompute: bool = False
    tp: int = 1

    @property
    def num_stages(self) -> int:
        return self.pp * (self.stages_per_rank or (1 if self.schedule in ("gpipe", "1f1b") else 2))


class FusedLoss(torch.autograd.Function):
    """Makes both gradients in its forward, as a loss in chunks does."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_VD: Tensor, labels_T: Tensor) -> Tensor:
        scores_TV = (x_TD @ w_VD.t()).log_softmax(dim=-1)
        grad_TV = scores_TV.exp() - nn.functional.one_hot(labels_T, V)
        ctx.save_for_backward(grad_TV @ w_VD, grad_TV.t() @ x_TD)
        return -scores_TV.gather(1, labels_T[:, None]).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x_TD, grad_w_VD = ctx.saved_tensors
        return grad_x_TD * grads[0], grad_w_VD * grads[0], None


class Layer(nn.Module):
    """Two matrices, one used twice, and a bias; the tokens of a row are gathered for the first, cut again for the second."""

    def __init__(self, tp: Axis) -> None:
        super().__init__()
        self.tp = tp
        self.up = nn.Linear(D, 2 * D)
        self.down = nn.Linear(2 * D, D, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        up = torch.tanh(self.up(all_gather(x_BSD, self.tp, dim=1)))
        mixed = self.down(up + up.cumsum(dim=1)) - self.down(up)
        return x_BSD + reduce_scatter(mixed / self.tp.size, self.tp, dim=1)


class Part(nn.Module):
    """A range of the layers, with the embedding or the head where it is an end."""

    def __init__(self, start: int, stop: int, tp: Axis, recompute: bool) -> None:
        super().__init__()
        self.tp, self.recompute = tp, recompute
        self.embedding = nn.Embedding(V, D) if start == 0 else None
        self.layers = nn.ModuleDict({str(index): Layer(tp) for index in range(start, stop)})
        self.head = nn.Linear(D, V, bias=False) if stop == NUM_LAYERS else None
        for name, parameter in self.named_parameters():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3

    def forward(self, x: Tensor, labels_BS: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x.chunk(self.tp.size, dim=1)[self.tp.rank])
        for layer in self.layers.values():
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        if self.head is None:
            return x
        labels = labels_BS.chunk(self.tp.size, dim=1)[self.tp.rank]
        loss: Tensor = FusedLoss.apply(x.reshape(-1, D), self.head.weight, labels.reshape(-1))
        return loss / 100


def bounds(num_stages: int) -> list[int]:
    """Where the stages begin and end: the first stages have a layer more than the last."""
    return [(index * NUM_LAYERS + num_stages - 1) // num_stages for index in range(num_stages + 1)]


def batch(step: int, data_rank: int, num_micro_batches: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(100 * step + data_rank)
    tokens_MBS = torch.randint(V, (num_micro_batches, B, S + 1), generator=generator)
    return list(tokens_MBS[..., :-1]), list(tokens_MBS[..., 1:])


@dataclass
class Made:
    """What one rank has of a pipeline."""

    mesh: Mesh
    parts: list[Part]
    pipeline: Pipeline
    losses: list[Tensor]


def make(world: World, case: Case, layout: Layout) -> Made:
    mesh = Mesh(world, layout)
    pp, tp = mesh.axis("pp"), mesh.axis("tp")
    cuts = bounds(case.num_stages)
    held = stages_of_rank(case.schedule, pp.rank, pp=pp.size, num_stages=case.num_stages)
    parts = [Part(cuts[index], cuts[index + 1], tp, case.recompute) for index in held]
    if layout.num_data_ranks > 1:
        dims = (("dp_replicate",), ("dp_shard",)) if layout.dp_replicate > 1 else (("dp_shard",),)
        for part in parts:
            shard(part, mesh.device_mesh(*dims), case.reshard)
    losses: list[Tensor] = []

    def forward_of(part: Part) -> Any:
        def forward(x: Tensor, labels_BS: Tensor) -> Tensor:
            out: Tensor = part(x, labels_BS)
            if part.head is not None:
                losses.append(out.detach())
            return out

        return forward

    pipeline = Pipeline(
        [StagePart(index=index, module=part, forward=forward_of(part)) for index, part in zip(held, parts, strict=True)],
        num_stages=case.num_stages,
        axis=pp,
        schedule=case.schedule,
        num_micro_batches=case.num_micro_batches,
        hidden=torch.empty(B, S // tp.size, D, device="meta"),
        device=torch.device("cpu"),
        split_backward=case.split_backward,
        reshard=case.reshard,
    )
    return Made(mesh=mesh, parts=parts, pipeline=pipeline, losses=losses)


def shard(part: Part, device_mesh: Any, reshard: bool) -> None:
    for module in (*part.layers.values(), part):
        fully_shard(module, mesh=device_mesh, reshard_after_forward=reshard)
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


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
        parameter.data.add_(parameter.grad, alpha=-0.1)
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


@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fsdp2_reduces_each_unit_once_a_step(gloo_ranks: GlooPool, schedule: str, reshard: bool) -> None:
    case = Case(schedule=schedule, reshard=reshard)
    found = gloo_ranks(4, run, case, Layout(pp=2, dp_shard=2))
    check(found, alone(case, num_data_ranks=2))
    cuts = bounds(case.num_stages)
    ends = {0, case.num_stages - 1}
    for rank, record in enumerate(found):
        held = stages_of_rank(schedule, rank // 2, pp=2, num_stages=case.num_stages)
        units = sum(cuts[index + 1] - cuts[index] + (index in ends) for index in held)
        assert record.reductions == [units, units]


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_hybrid_sharding(gloo_ranks: GlooPool, schedule: str) -> None:
    case = Case(schedule=schedule, num_micro_batches=4)
    check(gloo_ranks(8, run, case, Layout(pp=2, dp_replicate=2, dp_shard=2)), alone(case, num_data_ranks=4))
