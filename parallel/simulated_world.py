"""One rank of a world that is not there: a process group whose collectives return at once, with nothing in them.

For building what a rank of thousands would hold, on the meta device. torch keeps this backend among its test tools; its
name and store have been the same since torch 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.errors import ParallelError
from parallel.world import World


@contextmanager
def open_simulated_world(*, world_size: int, rank: int) -> Iterator[World]:
    """Rank `rank` of `world_size`, on the CPU, for as long as the context lasts. What collectives return means nothing.

    Raises `ParallelError` where there is no such rank, or this process belongs to a world already.
    """
    if not 0 <= rank < world_size:
        raise ParallelError(
            f"there is no rank {rank} in a world of {world_size}: ranks count from 0 to {world_size - 1}"
        )
    if dist.is_initialized():
        raise ParallelError(
            "a world cannot be simulated in a process that belongs to one: start it outside of torchrun"
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield World(
            rank=rank,
            world_size=world_size,
            local_rank=0,
            device=torch.device("cpu"),
            backend="fake",
            timeout=timedelta(seconds=60),
            control_group=dist.group.WORLD,
        )
    finally:
        dist.destroy_process_group()
