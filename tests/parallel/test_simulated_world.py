"""A world of one process that believes in thousands."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from parallel.collectives import all_gather
from parallel.errors import ParallelError
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.simulated_world import open_simulated_world


def test_a_mesh_of_thousands() -> None:
    with open_simulated_world(world_size=4096, rank=77) as world:
        mesh = Mesh(world, Layout(pp=8, dp_shard=64, tp=8, ep=32))
        assert mesh.axis("tp").ranks == tuple(range(72, 80))
        assert mesh.axis("ep").size == 32
        assert all_gather(torch.zeros(2, 3), mesh.axis("tp"), 0).shape == (16, 3)
    assert not dist.is_initialized()


def test_there_must_be_such_a_rank() -> None:
    message = "there is no rank 4 in a world of 4: ranks count from 0 to 3"
    with pytest.raises(ParallelError, match=message), open_simulated_world(world_size=4, rank=4):
        pass


def test_a_process_belongs_to_one_world() -> None:
    message = "start it outside of torchrun"
    with (
        open_simulated_world(world_size=2, rank=0),
        pytest.raises(ParallelError, match=message),
        open_simulated_world(world_size=2, rank=0),
    ):
        pass
