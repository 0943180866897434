"""Bytes of live tensors are counted once, when they come, shrink and go."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from parallel.memory_tracker import MemoryTracker


@pytest.mark.parametrize("device", ["cpu", "meta", "fake"])
def test_current_and_peak(device: str) -> None:
    with FakeTensorMode() if device == "fake" else torch.device(device), MemoryTracker() as tracker:
        x = torch.zeros(100)
        view = x.view(10, 10)[2:]
        assert tracker.current.total == 400
        y = x + 1
        del x
        assert tracker.current.total == 800
        del view, y
    assert tracker.current.total == 0
    assert tracker.peak.total == 800


def test_what_was_there_before_and_a_new_peak() -> None:
    before = torch.zeros(50)
    with MemoryTracker() as tracker:
        tracker.adopt([before, before[:10], None])
        torch.zeros(1000)
        assert (tracker.current.total, tracker.peak.total) == (200, 4200)
        tracker.reset_peak()
        assert tracker.peak.total == 200
        torch.zeros(10)
        assert tracker.peak.total == 240


def test_what_is_left_out() -> None:
    with MemoryTracker() as tracker:
        x = torch.zeros(100)
        tracker.leave_out(x)
        assert tracker.current.total == 0
        y = x.view(10, 10) + 1
        assert tracker.current.total == 400
        del x, y
        assert tracker.current.total == 0


def test_kinds_at_the_peak() -> None:
    layer = nn.Linear(10, 10, bias=False)
    tracker = MemoryTracker(
        lambda: {"parameters": layer.parameters(), "gradients": [p.grad for p in layer.parameters()]}
    )
    with tracker:
        tracker.adopt(layer.parameters())
        loss = layer(torch.ones(10)).sum()
        assert tracker.current.by_kind == {"parameters": 400, "gradients": 0, "activations": 40 + 4}
        loss.backward()
        big = torch.zeros(100)
        assert tracker.peak.by_kind["gradients"] == 400
        assert sum(tracker.peak.by_kind.values()) == tracker.peak.total
        del big


def test_a_storage_that_shrinks() -> None:
    resize = torch.UntypedStorage.resize_
    with MemoryTracker() as tracker:
        x = torch.zeros(100)
        x.untyped_storage().resize_(0)
        assert tracker.current.total == 0
        x.untyped_storage().resize_(200)
        assert tracker.current.total == 200
    assert torch.UntypedStorage.resize_ is resize


def sharded(world: Any, reshard: bool) -> tuple[int, int]:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)
    with MemoryTracker() as tracker:
        tracker.adopt(model.parameters())
        with torch.no_grad():
            model(torch.ones(1, 64))
        gc.collect()  # what lies in a cycle is free, too
        return tracker.current.total, tracker.peak.total


def test_gathered_parameters_are_counted_while_they_are_there(gloo_ranks: Any) -> None:
    whole, shards = 4 * 64 * 64 * 4, 4 * 64 * 64 * 2
    freed, peak = gloo_ranks(2, sharded, True)[0]
    assert shards <= freed < shards + 1024
    kept, _ = gloo_ranks(2, sharded, False)[0]
    assert shards + whole <= kept
    assert peak < shards + whole
