"""What is made of torch's flight recorder; its records are written out as torch 2.13 gives them."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
import torch.distributed as dist

from cluster.errors import FabricError
from cluster.fabric.watch.flight import (
    _uses_nccl,
    axis_name,
    counters,
    group_calls,
    group_members,
    habitual_calls,
    recorded_calls,
)
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
    entries = [_entry(1), _entry(1, **tp), _entry(2, retired=False), _entry(2, "gloo:_allgather_base", **tp)]
    world, along_tp = group_calls(entries, MEMBERS, NOW_NS)
    assert (world.axis, world.ranks, world.entered) == ("world", (0, 1, 2, 3), 2)
    assert [(call.number, call.done) for call in world.calls] == [(1, True), (2, False)]
    assert world.calls[0].text == "all_reduce of 1000 Float"
    assert world.calls[0].age_s == pytest.approx(3.0)
    assert (along_tp.axis, along_tp.calls[1].text) == ("tp", "all_gather of 1000 Float")


def test_backends_of_one_group_count_apart() -> None:
    entries = [_entry(1), _entry(90, pg_id=5), _entry(3, "nccl:all_reduce", pg_id=2, retired=False)]
    gloo, nccl, _ = group_calls(entries, MEMBERS, NOW_NS)
    assert (gloo.axis, nccl.axis) == ("world", "world")
    assert gloo.name != nccl.name
    assert (gloo.entered, nccl.entered) == (90, 3)
    assert {call.group: call.number for call in habitual_calls(entries)} == {gloo.name: 90, nccl.name: 3}


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


class _BothRecorders:
    """torch's functions as a build with NCCL has them: what is called on NCCL, the gloo recorder never sees."""

    def __init__(self) -> None:
        self.nccl_calls = 1

    def _status(self, calls: int) -> dict[str, Any]:
        return {"0": {"last_enqueued_collective": calls, "last_completed_collective": calls}} if calls else {}

    def _dump_fr_trace_json(self, **_: bool) -> bytes:
        return json.dumps({"pg_status": self._status(1)}).encode()

    def _dump_nccl_trace_json(self, **_: bool) -> bytes:
        return json.dumps({"pg_status": self._status(self.nccl_calls)}).encode()

    def _dump_fr_trace(self, **_: bool) -> bytes:
        return pickle.dumps({"entries": [_entry(1, time_created_ns=5)]})

    def _dump_nccl_trace(self, **_: bool) -> bytes:
        return pickle.dumps({"entries": [_entry(7, "nccl:all_reduce", time_created_ns=4)]})


@pytest.fixture
def _on_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.fabric.watch.flight._uses_nccl", lambda: True)


@pytest.mark.usefixtures("_on_nccl")
def test_both_recorders_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    recorders = _BothRecorders()
    monkeypatch.setattr("torch._C._distributed_c10d", recorders)
    before = counters()
    recorders.nccl_calls = 2
    assert counters() != before
    assert [entry["collective_seq_id"] for entry in recorded_calls()] == [7, 1]  # by time
    recorders.nccl_calls = 0
    assert counters() is None  # not called yet, or not recorded: nobody can tell


@pytest.mark.usefixtures("_on_nccl")
def test_nccl_without_its_recorder_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in ("_dump_nccl_trace", "_dump_nccl_trace_json"):
        monkeypatch.delattr(_BothRecorders, function)
    monkeypatch.setattr("torch._C._distributed_c10d", _BothRecorders())
    for read in (counters, recorded_calls):
        with pytest.raises(FabricError, match="groups on NCCL and no flight recorder for them"):
            read()


@pytest.mark.parametrize(("config", "uses"), [("cpu:gloo,cuda:nccl", True), ("cuda:nccl", True), ("cpu:gloo", False)])
def test_which_groups_use_nccl(monkeypatch: pytest.MonkeyPatch, config: str, uses: bool) -> None:
    monkeypatch.setitem(dist.distributed_c10d._world.pg_backend_config, object(), config)  # type: ignore[misc]
    assert _uses_nccl() is uses


def _record(world: World) -> tuple[bool, tuple[GroupCalls, ...], int]:
    import time

    import torch

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
