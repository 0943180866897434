"""A small stack of layers in any number of stages, for the tests of `parallel.pipeline`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from parallel.collectives import all_gather, reduce_scatter
from parallel.layout import Layout
from parallel.mesh import Axis, Mesh
from parallel.pipeline import Pipeline, StagePart
from parallel.stages import stages_of_rank
from parallel.world import World

# Shape suffixes: B rows of a micro batch, S tokens of a row, D width, T rows * tokens, V vocabulary.
B, S, D, V = 2, 4, 6, 11
NUM_LAYERS = 9


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layout and one schedule."""

    schedule: str
    pp: int = 2
    num_micro_batches: int = 6
    stages_per_rank: int = 0
    reshard: bool = False
    param_dtype: torch.dtype | None = None
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
    """Weights used once, twice side by side, and twice one upon the other; gathers the tokens of a row in between."""

    def __init__(self, tp: Axis) -> None:
        super().__init__()
        self.tp = tp
        self.turn = nn.Linear(D, D)
        self.up = nn.Linear(D, 2 * D)
        self.down = nn.Linear(2 * D, D, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        turned = x_BSD + self.turn(torch.tanh(self.turn(x_BSD)))
        up = torch.tanh(self.up(all_gather(turned, self.tp, dim=1)))
        mixed = self.down(up.cumsum(dim=1) / 4) + self.down(up)
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
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2

    def forward(self, x: Tensor, labels_BS: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x.chunk(self.tp.size, dim=1)[self.tp.rank])
        for layer in self.layers.values():
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        if self.head is None:
            return x
        labels = labels_BS.chunk(self.tp.size, dim=1)[self.tp.rank]
        loss: Tensor = FusedLoss.apply(x.reshape(-1, D), self.head.weight, labels.reshape(-1))
        return loss.float() / 100


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
    held = stages_of_rank(pp.rank, pp.size, case.num_stages, case.schedule)
    parts = [Part(cuts[index], cuts[index + 1], tp, case.recompute) for index in held]
    if layout.num_data_ranks > 1:
        dims = (("dp_replicate",), ("dp_shard", "cp")) if layout.dp_replicate > 1 else (("dp_shard", "cp"),)
        for part in parts:
            shard(part, mesh.device_mesh(*dims), case)
    losses: list[Tensor] = []

    def forward_of(part: Part) -> Any:
        def forward(x: Tensor, labels_BS: Tensor) -> Tensor:
            out: Tensor = part(x, labels_BS)
            if part.head is not None:
                losses.append(out.detach())
            return out

        return forward

    pipeline = Pipeline(
        [
            StagePart(index=index, module=part, forward=forward_of(part))
            for index, part in zip(held, parts, strict=True)
        ],
        num_stages=case.num_stages,
        axis=pp,
        schedule=case.schedule,
        num_micro_batches=case.num_micro_batches,
        hidden=torch.empty(B, S // tp.size, D, dtype=case.param_dtype, device="meta"),
        device=torch.device("cpu"),
        split_backward=case.split_backward,
        reshard=case.reshard,
    )
    return Made(mesh=mesh, parts=parts, pipeline=pipeline, losses=losses)


def shard(part: Part, device_mesh: Any, case: Case) -> None:
    policy = MixedPrecisionPolicy(param_dtype=case.param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*part.layers.values(), part):
        fully_shard(module, mesh=device_mesh, mp_policy=policy, reshard_after_forward=case.reshard)
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
