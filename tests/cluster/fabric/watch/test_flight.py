"""What is made of torch's flight recorder; its records are written out as torch 2.13 gives them."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.fabric.watch.flight import axis_name, counters, group_calls, group_members, habitual_calls, recorded_calls
from cluster.fabric.watch.state import NO_PEER, GroupCalls, pack_groups, pack_ranks, unpack_groups, unpack_ranks
from parallel.world import World
from tests.gloo_pool import GlooPool

NOW_NS = 2_000_000_000_000
MEMBERS = {"0": ("default_pg", (0, 1, 2, 3)), "7": ("mesh_tp", (2, 3)), "9": ("alone", (2,))}


def _entry(number: int, operation: str = "gloo:all_reduce", **more: Any) -> dict[str, Any]:
    return {
        "pg_id": 0,
        "process_group": ("0", "default_pg"),
        "collective_seq_id": number,
        "p2p_seq_id": 0,
        "is_p2p": False,
        "profiling_name": operation,
        "input_sizes": [[10, 100]],
        "input_dtypes": ["Float"],
        "state": "scheduled",
        "retired": True,
        "time_created_ns": NOW_NS - 3_000_000_000,
        **more,
    }


def test_calls_by_group() -> None:
    tp = {"process_group": ("7", "mesh_tp"), "pg_id": 3}
    entries = [_entry(1), _entry(1, **tp), _entry(2, retired=False), _entry(2, "nccl:_allgather_base", **tp)]
    world, along_tp = group_calls(entries, MEMBERS, NOW_NS)
    assert (world.axis, world.ranks, world.entered) == ("world", (0, 1, 2, 3), 2)
    assert [(call.number, call.done) for call in world.calls] == [(1, True), (2, False)]
    assert world.calls[0].text == "all_reduce of 1000 Float"
    assert world.calls[0].age_s == pytest.approx(3.0)
    assert (along_tp.axis, along_tp.calls[1].text) == ("tp", "all_gather of 1000 Float")


def test_the_last_calls_are_kept_and_a_group_without_calls_is_there() -> None:
    world, along_tp = group_calls([_entry(number) for number in range(1, 101)], MEMBERS, NOW_NS)
    assert [call.number for call in world.calls] == list(range(69, 101))
    assert along_tp.entered is None


def test_calls_of_an_earlier_world_under_the_same_name_do_not_count() -> None:
    entries = [_entry(50), _entry(1, pg_id=8)]
    assert group_calls(entries, MEMBERS, NOW_NS)[0].entered == 1
    assert [call.number for call in habitual_calls(entries)] == [1]


def test_messages_have_the_world_rank_of_their_other_end() -> None:
    tp = {"process_group": ("7", "mesh_tp"), "pg_id": 3, "is_p2p": True, "p2p_seq_id": 5}
    entries = [_entry(1, "nccl:recv 0<-1", **tp), _entry(1, "nccl:send 1->0", **tp), _entry(1, "nccl:coalesced", **tp)]
    calls = group_calls(entries, MEMBERS, NOW_NS)[1].calls
    assert [call.peer for call in calls] == [3, 2, NO_PEER]
    assert habitual_calls(entries) == []


@pytest.mark.parametrize(
    ("operation", "one", "other", "fits"),
    [
        ("gloo:all_reduce", {"input_sizes": [[1000]]}, {"input_sizes": [[10, 100]]}, True),
        ("gloo:all_reduce", {"input_sizes": [[999]]}, {}, False),
        ("gloo:all_reduce", {"input_dtypes": ["Half"]}, {}, False),
        ("gloo:all_to_all", {"input_sizes": [[3]]}, {}, True),
        ("gloo:all_to_all", {"input_dtypes": ["Half"]}, {}, False),
        ("gloo:scatter", {"input_sizes": [], "input_dtypes": []}, {}, True),
        ("gloo:barrier", {"input_sizes": [], "input_dtypes": []}, {"input_sizes": [], "input_dtypes": []}, True),
    ],
)
def test_which_calls_fit_together(operation: str, one: dict[str, Any], other: dict[str, Any], fits: bool) -> None:
    digests = [group_calls([_entry(1, operation, **each)], MEMBERS, NOW_NS)[0].calls[0].digest for each in (one, other)]
    assert (digests[0] == digests[1]) is fits


def test_names_of_axes() -> None:
    assert axis_name("0", "default_pg") == "world"
    assert axis_name("5", "mesh_dp_shard") == "dp_shard"
    assert axis_name("e141ae2001c03c61", "undefined") == "group e141ae20"


@pytest.mark.parametrize(
    ("ranks", "packed"),
    [((0, 1, 2, 3), [0, 4, 1]), ((1, 3, 5), [1, 3, 2]), ((7,), [7, 1, 1]), ((0, 1, 5), [0, 2, 1, 5, 1, 1]), ((), [])],
)
def test_ranks_travel_packed(ranks: tuple[int, ...], packed: list[int]) -> None:
    assert pack_ranks(ranks) == packed
    assert unpack_ranks(packed) == ranks
    assert len(pack_ranks(range(16_384))) == 3


def test_groups_travel_and_age() -> None:
    groups = group_calls([_entry(1), _entry(2, retired=False)], MEMBERS, NOW_NS)
    assert unpack_groups(pack_groups(groups)) == groups
    assert unpack_groups(pack_groups(groups), later_s=2.0)[0].calls[0].age_s == pytest.approx(5.0)


def _record(world: World) -> tuple[bool, tuple[GroupCalls, ...], int]:
    import time

    import torch
    import torch.distributed as dist

    before = counters()
    group = dist.new_group(list(range(world.world_size)), group_desc="mesh_cp")
    dist.all_reduce(torch.ones(7), group=group)
    entries = recorded_calls()
    return before != counters(), group_calls(entries, group_members(), time.time_ns()), len(habitual_calls(entries))


def test_torch_tells_this(gloo_ranks: GlooPool) -> None:
    for moved, groups, habitual in gloo_ranks(2, _record):
        assert moved
        along_cp = next(group for group in groups if group.axis == "cp")
        assert (along_cp.ranks, along_cp.entered) == ((0, 1), 1)
        assert along_cp.calls[0].text == "all_reduce of 7 Float"
        assert along_cp.calls[0].age_s < 60
        assert habitual >= 1
