"""Every way to communicate is seen, counted once, under its axis, with its bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from parallel import collectives
from parallel.ledger import CommunicationLedger, LedgerKey, LedgerRow, Spread, merge
from parallel.mesh import Axis
from parallel.world import World
from tests.gloo_pool import GlooPool

Rows = list[tuple[str, str, str, int, int]]


def plain(ledger: CommunicationLedger) -> Rows:
    return [(r.key.axis, r.key.kind, r.key.dtype, r.count, r.num_bytes) for r in ledger.rows]


def tp_axis(world: World) -> Axis:
    ranks = tuple(range(world.world_size))
    group = dist.new_group(list(ranks), group_desc="tp", use_local_synchronization=True)
    return Axis(name="tp", size=len(ranks), rank=world.rank, ranks=ranks, group=group)


def seen(world: World, name: str) -> Rows:
    """What the ledger has of one of `ACTIONS`."""
    axis = tp_axis(world)
    action = ACTIONS[name](world, axis)
    ledger = CommunicationLedger(world)
    with ledger.step():
        action()
    action()  # not recorded any more
    return plain(ledger)


def ours(world: World, axis: Axis) -> Callable[[], Any]:
    x = torch.ones(4, 6, requires_grad=True)

    def action() -> None:
        y = collectives.all_gather(x, axis, 0)  # (8, 6)
        z = collectives.reduce_scatter(y, axis, 1)  # (8, 3)
        send, receive = ((2, 6), (2, 3)) if world.rank == 0 else ((3, 5), (6, 5))
        moved = collectives.all_to_all(z, axis, send=send, receive=receive)
        moved.sum().backward()
        collectives.all_reduce(torch.ones(5, dtype=torch.int64), axis)

    return action


def messages(world: World, axis: Axis) -> Callable[[], Any]:
    def action() -> None:
        peer = 1 - world.rank
        ops = [
            dist.P2POp(dist.isend, torch.ones(5), peer, axis.group),
            dist.P2POp(dist.irecv, torch.ones(5), peer, axis.group),
        ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        if world.rank == 0:
            dist.send(torch.ones(3, dtype=torch.bfloat16), 1)
        else:
            dist.recv(torch.ones(3, dtype=torch.bfloat16), 0)

    return action


def classic(world: World, axis: Axis) -> Callable[[], Any]:
    def action() -> None:
        dist.all_reduce(torch.ones(3))
        dist.broadcast(torch.ones(4), src=0)
        dist.all_gather([torch.ones(2), torch.ones(2)], torch.ones(2))
        dist.reduce_scatter_tensor(torch.ones(2), torch.ones(4))
        dist.barrier(group=axis.group)
        world.barrier()

    return action


def objects(world: World, axis: Axis) -> Callable[[], Any]:
    def action() -> None:
        world.broadcast_object("x" * 100 if world.is_main else None)
        world.all_gather_object(world.rank)

    return action


def replicated(world: World, axis: Axis) -> Callable[[], Any]:
    model = DistributedDataParallel(nn.Linear(6, 2, bias=False), process_group=axis.group)
    model.register_comm_hook(axis.group, allreduce_hook)
    return lambda: model(torch.ones(3, 6)).sum().backward()


def sharded(world: World, axis: Axis) -> Callable[[], Any]:
    model = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False))
    assert axis.group is not None
    mesh = DeviceMesh.from_group(axis.group, "cpu", mesh=torch.arange(2), mesh_dim_names=("tp",))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def action() -> None:
        model(torch.ones(3, 6)).sum().backward()
        # A collective inside an operator of a DTensor.
        nn.utils.get_total_norm([p.grad for p in model.parameters()]).full_tensor()  # type: ignore[misc]

    return action


def from_a_thread(world: World, axis: Axis) -> Callable[[], Any]:
    def action() -> None:
        thread = threading.Thread(target=lambda: dist.all_reduce(torch.ones(3)))
        thread.start()
        thread.join()

    return action


ACTIONS = {f.__name__: f for f in (ours, messages, classic, objects, replicated, sharded, from_a_thread)}


def test_our_collectives_forward_and_backward(gloo_ranks: GlooPool) -> None:
    for rank, rows in enumerate(gloo_ranks(2, seen, "ours")):
        sent = (8 * 3 + (5 if rank == 0 else 11) * 3) * 4
        assert rows == [
            ("tp", "all_gather", "float32", 2, 2 * 8 * 6 * 4),
            ("tp", "all_reduce", "int64", 1, 5 * 8),
            ("tp", "all_to_all", "float32", 2, sent),
            ("tp", "reduce_scatter", "float32", 2, 2 * 8 * 6 * 4),
        ]


def test_messages_are_sends_on_one_side_and_receives_on_the_other(gloo_ranks: GlooPool) -> None:
    first, second = gloo_ranks(2, seen, "messages")
    batched = [("tp", "recv", "float32", 1, 20), ("tp", "send", "float32", 1, 20)]
    assert first == [*batched, ("world", "send", "bfloat16", 1, 6)]
    assert second == [*batched, ("world", "recv", "bfloat16", 1, 6)]


def test_torch_s_own_collectives_and_barriers(gloo_ranks: GlooPool) -> None:
    for rows in gloo_ranks(2, seen, "classic"):
        assert rows == [
            ("tp", "barrier", "none", 1, 0),
            ("world", "all_gather", "float32", 1, 2 * 2 * 4),
            ("world", "all_reduce", "float32", 1, 3 * 4),
            ("world", "barrier", "none", 1, 0),
            ("world", "broadcast", "float32", 1, 4 * 4),
            ("world", "reduce_scatter", "float32", 1, 4 * 4),
        ]


def test_pickled_objects_are_seen(gloo_ranks: GlooPool) -> None:
    for rows in gloo_ranks(2, seen, "objects"):
        counts = {(kind, dtype): count for _, kind, dtype, count, _ in rows}
        assert counts[("broadcast", "uint8")] == 1  # the object, after its length
        assert counts[("all_gather", "uint8")] == 1
        assert all(axis == "world" for axis, *_ in rows)  # on gloo alone the group of control is that of the world


def test_ddp_s_hook_is_seen_in_the_backward(gloo_ranks: GlooPool) -> None:
    for rows in gloo_ranks(2, seen, "replicated"):
        assert rows == [("tp", "all_reduce", "float32", 1, 12 * 4)]


def test_fsdp2_and_dtensors_are_seen(gloo_ranks: GlooPool) -> None:
    for rows in gloo_ranks(2, seen, "sharded"):
        assert rows == [
            ("tp", "all_gather", "float32", 4, 4 * 12 * 4),  # each unit in forward and backward
            ("tp", "all_reduce", "float32", 1, 2 * 4),  # two norms
            ("tp", "reduce_scatter", "float32", 2, 2 * 12 * 4),
        ]


def test_other_threads_are_not_seen(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(2, seen, "from_a_thread") == [[], []]


def with_a_control_group(world: World) -> Rows:
    control = dist.new_group(backend="gloo")
    apart = World(**{**vars(world), "control_group": control})
    ledger = CommunicationLedger(apart)
    with ledger.step():
        apart.barrier()
        dist.all_reduce(torch.ones(1), group=dist.new_group([0, 1]))
    return plain(ledger)


def test_groups_have_the_names_of_their_axes(gloo_ranks: GlooPool) -> None:
    for rows in gloo_ranks(2, with_a_control_group):
        assert ("control", "barrier", "none", 1, 0) in rows
        assert ("ranks 0,1", "all_reduce", "float32", 1, 4) in rows


def pages(world: World) -> tuple[Rows, Rows]:
    ledger = CommunicationLedger(world)
    with ledger.step():
        dist.all_reduce(torch.ones(3))
    first = plain(ledger)
    try:
        with ledger.step():
            dist.all_reduce(torch.ones(1))
            raise KeyError
    except KeyError:
        pass
    dist.all_reduce(torch.ones(3))
    return first, plain(ledger)


def test_a_group_of_one_sends_nothing(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(1, pages) == [([], [])]


def test_each_step_is_a_page_of_its_own(gloo_ranks: GlooPool) -> None:
    for first, second in gloo_ranks(2, pages):
        assert first == [("world", "all_reduce", "float32", 1, 12)]
        assert second == [("world", "all_reduce", "float32", 1, 4)]


def test_pages_of_unequal_ranks_merge() -> None:
    send, norm = LedgerKey(axis="pp", kind="send", dtype="float32"), LedgerKey(axis="world", kind="x", dtype="int64")
    first = [LedgerRow(key=send, count=2, num_bytes=80), LedgerRow(key=norm, count=1, num_bytes=8)]
    last = [LedgerRow(key=norm, count=1, num_bytes=8)]
    sends, norms = merge([first, last])
    assert (sends.key, norms.key) == (send, norm)
    assert sends.count == Spread(least=0, most=2, total=2)
    assert sends.num_bytes == Spread(least=0, most=80, total=80)
    assert not sends.count.is_even
    assert norms.count.is_even
    assert norms.num_bytes.total == 16
