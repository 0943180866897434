"""Small modules, optimizers and steps for the tests of `parallel`, which knows no decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from parallel.data_parallel import DataParallel, Units, wrap
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.world import World

WIDTH = 10
"""No multiple of 3: shards on three ranks are uneven, and those of the last layer's bias are empty on one."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return x_BD + self.down(torch.nn.functional.gelu(self.up(x_BD)))


class Net(nn.Module):
    """Three blocks, a buffer, and a head of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 2)
        self.register_buffer("load", torch.zeros(4))

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x_BD = block(x_BD)
        return self.head(x_BD)


def is_block(name: str, module: nn.Module) -> bool:
    return isinstance(module, Block)


UNITS = Units(is_unit=is_block)


def flat_mesh(world: World) -> Mesh:
    """All ranks see different samples."""
    return Mesh(world, Layout(dp_shard=world.world_size))


def build(world: World, engine: Any, *, seed: int = 0, **options: Any) -> DataParallel:
    torch.manual_seed(seed)
    return wrap([Net()], mesh=flat_mesh(world), placements={}, engine=engine, units=UNITS, **options)


def optimizers_of(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Two optimizers, of two kinds, one with two groups, as the trainer has them."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [
        torch.optim.AdamW([{"params": matrices[:2], "lr": 1e-2}, {"params": matrices[2:], "lr": 3e-3}]),
        torch.optim.SGD(vectors, lr=1e-2, momentum=0.9),
    ]


def global_batch(step: int, size: int = 12) -> torch.Tensor:
    return torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(step))


def train(
    world: World, parallel: DataParallel, optimizers: Sequence[torch.optim.Optimizer], steps: range
) -> list[tuple[float, float]]:
    """Each step's (global loss, gradient norm), of two micro steps over this rank's share of the global batch."""
    record = []
    for step in steps:
        batch = global_batch(step)
        share = batch.view(world.world_size, -1, WIDTH)[world.rank]
        total = torch.zeros(())
        for index, micro_batch in enumerate(share.chunk(2)):
            with parallel.micro_step(is_last=index == 1):
                loss = parallel.module(micro_batch).pow(2).sum() / len(batch)
                loss.backward()
            total += loss.detach()
        norm = parallel.clip_grad_norm(1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        record.append((world.all_reduce_sum(total).item(), norm.item()))
    return record
