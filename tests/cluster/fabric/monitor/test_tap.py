"""Durations of real collectives on gloo, whoever issues them; and nothing left behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cluster.fabric.monitor import tap as tap_module
from cluster.fabric.monitor.durations import Record
from cluster.fabric.monitor.tap import CollectiveTap
from parallel.world import World
from tests.gloo_pool import GlooPool

LATE_S = 1.0
"""Long against what a busy machine may hold a rank up."""


def _plain(world: World) -> Any:
    x = torch.arange(1000.0) + world.rank
    dist.all_reduce(x)
    return x


def _asynchronous(world: World) -> Any:
    x = torch.arange(1000.0) + world.rank
    dist.all_reduce(x, async_op=True).wait()
    return x


def _functional(world: World) -> Any:
    ops = torch.ops._c10d_functional
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    x = torch.arange(1000.0) + world.rank
    gathered = ops.wait_tensor(ops.all_gather_into_tensor(x, world.world_size, name))
    return ops.wait_tensor(ops.reduce_scatter_tensor(gathered, "sum", world.world_size, name))


def _reducer(world: World) -> Any:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(20, 20))
    model(torch.ones(3, 20) * (world.rank + 1)).sum().backward()
    return model.module.weight.grad


def _sharded(world: World) -> Any:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Linear(20, 20)
    fully_shard(model)
    model(torch.ones(3, 20) * (world.rank + 1)).sum().backward()
    return model.weight.grad.to_local()  # type: ignore[union-attr]


def _messages(world: World) -> Any:
    x, y = torch.arange(1000.0) + world.rank, torch.empty(1000)
    other = 1 - world.rank
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, x, other), dist.P2POp(dist.irecv, y, other)]):
        work.wait()
    return y


def _tapped(world: World, issue: Callable[[World], Any], late_rank: int | None) -> tuple[list[Record], Any, Any]:
    """What was recorded while `late_rank` came late, and what the same gives without the tap, before and after."""
    issue(world)  # connections, lazily made groups
    expected = issue(world)
    tap = CollectiveTap()
    wait = dist.Work.wait
    dist.barrier()
    tap.start()
    try:
        if world.rank == late_rank:
            time.sleep(LATE_S)
        given = issue(world)
    finally:
        page = tap.stop()
    assert dist.Work.wait is wait
    after = issue(world)
    assert torch.equal(expected, after)
    return list(page.records), expected, given


@pytest.mark.parametrize(
    ("issue", "kinds", "num_bytes"),
    [
        (_plain, ["all_reduce"], [4000]),
        (_asynchronous, ["all_reduce"], [4000]),
        (_functional, ["all_gather", "reduce_scatter"], [8000, 8000]),
        (_sharded, ["all_gather", "reduce_scatter"], None),
    ],
)
def test_the_late_rank_has_the_shortest_duration_whoever_issues(
    gloo_ranks: GlooPool, issue: Callable[[World], Any], kinds: list[str], num_bytes: list[int] | None
) -> None:
    answers = gloo_ranks(2, _tapped, issue, 1)
    for records, expected, given in answers:
        assert torch.equal(expected, given)
        assert [record.kind for record in records] == kinds
        assert num_bytes is None or [record.num_bytes for record in records] == num_bytes
        assert all(record.seconds is not None and record.seconds > 0 for record in records)
    (punctual, _, _), (late, _, _) = answers
    waited = punctual[0].seconds - late[0].seconds  # type: ignore[operator]
    assert waited > 0.5 * LATE_S
    assert punctual[0].waited_s - late[0].waited_s > 0.5 * LATE_S


def test_what_the_reducer_waits_for_in_native_code_is_seen_too(gloo_ranks: GlooPool) -> None:
    for records, expected, given in gloo_ranks(2, _tapped, _reducer, None):
        assert torch.equal(expected, given)
        (gradients,) = [record for record in records if record.kind == "all_reduce"]
        assert gradients.num_bytes == 4 * 420
        assert gradients.seconds is not None
        assert gradients.waited_s == pytest.approx(gradients.seconds)


def test_an_end_that_is_due_is_waited_for() -> None:
    class Done:
        """A future that gloo's thread has completed; its callback runs as soon as others let it."""

        asked = 0

        def done(self) -> bool:
            self.asked += 1
            if self.asked == 3:
                record.seconds = 0.25
            return True

    record = Record(group="0", kind="all_reduce", num_bytes=4, started=1.0)
    page = tap_module._Page(unseen={id(record): record}, ends_due={1: (Done(), record)})
    tap_module._await_ends_due(page)
    tap_module._count_unseen_waits(page)
    assert record.waited_s == 0.25


def test_messages_are_timed_by_those_who_wait(gloo_ranks: GlooPool) -> None:
    answers = gloo_ranks(2, _tapped, _messages, 1)
    for records, expected, given in answers:
        assert torch.equal(expected, given)
        assert sorted(record.kind for record in records) == ["recv", "send"]
    received = next(record for record in answers[0][0] if record.kind == "recv")
    assert received.waited_s > 0 or received.seconds > 0.5 * LATE_S  # type: ignore[operator]


def _under_load(world: World, steps: int) -> int:
    """Many small collectives beside Python callbacks of futures: locks of gloo's threads and Python's must not cross."""
    x = torch.ones(64)
    tap = CollectiveTap()
    seen = 0
    for _ in range(steps):
        tap.start()
        for _ in range(20):
            work = dist.all_reduce(x, async_op=True)
            done = work.get_future().then(lambda future: future.value()[0] + 1)
            torch.ops._c10d_functional.wait_tensor(
                torch.ops._c10d_functional.all_reduce(x, "sum", dist.group.WORLD.group_name)  # type: ignore[union-attr]
            )
            done.wait()
        seen += len(tap.stop().records)
    return seen


def test_many_collectives_do_not_lock_one_another(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(2, _under_load, 30, timeout_s=90.0) == [1200, 1200]


def _cost_when_off(world: World) -> list[str]:
    """Operators of c10d that have a kernel at the tap's key."""
    tap = CollectiveTap()
    tap.start()
    dist.all_reduce(torch.ones(4))
    during = torch._C._dispatch_has_kernel_for_dispatch_key("c10d::allreduce_", "BackendSelect")
    tap.stop()
    after = torch._C._dispatch_has_kernel_for_dispatch_key("c10d::allreduce_", "BackendSelect")
    return [str(during), str(after)]


def test_between_taps_nothing_is_in_the_way(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(2, _cost_when_off) == [["True", "False"]] * 2


def _sparse(world: World) -> tuple[int, list[int]]:
    """An all-reduce of a tensor that has no storage, in a tapped step."""
    x = torch.sparse_coo_tensor(torch.tensor([[world.rank]]), torch.ones(1), (4,))
    tap = CollectiveTap()
    tap.start()
    try:
        dist.all_reduce(x)
    finally:
        page = tap.stop()
    return int(x.to_dense().sum()), [record.num_bytes for record in page.records]


def test_sparse_gradients_are_reduced_as_without_the_tap(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(2, _sparse) == [(2, [12]), (2, [12])]


def _with_broken_notes(world: World) -> tuple[float, int]:
    """The tap itself has a fault, after the collective is under way."""
    original = tap_module._note

    def fail(*_: object) -> None:
        raise RuntimeError("the tap is broken")

    tap_module._note = fail
    tap = CollectiveTap()
    x = torch.ones(4)
    tap.start()
    try:
        dist.all_reduce(x)
    finally:
        page = tap.stop()
        tap_module._note = original
    return float(x.sum()), len(page.records)


def test_a_fault_of_the_tap_leaves_the_collective_alone(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(2, _with_broken_notes) == [(8.0, 0), (8.0, 0)]


def _half_a_start(world: World) -> tuple[bool, bool]:
    """The last thing that `start` does fails."""
    original, wait = tap_module._timed_wait_tensor, dist.Work.wait

    def fail(*_: object) -> None:
        raise RuntimeError("no kernel")

    tap_module._timed_wait_tensor = fail
    tap = CollectiveTap()
    try:
        tap.start()
    except RuntimeError:
        tap.stop()
    finally:
        tap_module._timed_wait_tensor = original
    left = torch._C._dispatch_has_kernel_for_dispatch_key("c10d::allreduce_", "BackendSelect")
    return dist.Work.wait is wait, left


def test_half_a_start_can_be_undone(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(1, _half_a_start) == [(True, False)]
