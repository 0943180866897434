"""Questions to ranks beside the measuring: answered before anybody connects, and announced even to what an error has left."""

from __future__ import annotations

import os
import socket
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from cluster.errors import FabricError
from cluster.fabric.measured.fabric import MeasuredFabric, run_on_fabric
from cluster.fabric.measured.meeting import keep_meeting_point, meet
from cluster.fabric.measured.place import FabricPlace, MeasureOptions
from cluster.fabric.probing import UnresponsiveError
from parallel.world import World
from tests.gloo_pool import GlooPool

LAZY = MeasureOptions(transport="gloo", start_timeout_s=30.0, silence_s=5.0, round_timeout_s=15.0, lazy=True)


def place_of(world: World, *, world_size: int | None = None) -> FabricPlace:
    return FabricPlace(
        rank=world.rank,
        world_size=world_size or world.world_size,
        local_rank=0,
        local_world_size=1,
        address=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        host=f"n{world.rank}",
        agent_store=True,
    )


def num_sockets() -> int:
    return sum("socket:" in os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))


def asked(world: World) -> Any:
    heard: list[Any] = []

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        heard.append(question)
        return {"rank": world.rank, "twice": 2 * question.get("number", 0)}

    def work(fabric: MeasuredFabric) -> Any:
        before = num_sockets()
        questions = {rank: {"number": rank + 10} for rank in (2, 0)}
        answers = fabric.question(questions, timeout_s=10.0, during="asking")
        opened = num_sockets() - before
        rates = fabric.transfer(np.array([[0, 1]]), num_bytes=1 << 18)
        fabric.announce({"last": "word"})
        return dict(fabric.hosts), answers, opened, bool((rates > 0).all())

    return run_on_fabric(place_of(world), LAZY, work, answer=answer), heard


def test_ranks_answer_before_they_connect_and_measure_afterwards(gloo_ranks: GlooPool) -> None:
    (found, heard), (_, heard_by_1), (_, heard_by_2) = gloo_ranks(3, asked)
    hosts, answers, opened, measured = found
    assert hosts == {0: "n0", 1: "n1", 2: "n2"}
    assert answers == {0: {"rank": 0, "twice": 20}, 2: {"rank": 2, "twice": 24}}
    assert (opened, measured) == (0, True)
    last = {"last": "word"}
    assert (heard, heard_by_1, heard_by_2) == ([{"number": 10}, last], [last], [{"number": 12}, last])


def asked_without_the_last(world: World) -> Any:
    heard: list[Any] = []

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        heard.append(question)
        return {}

    def work(fabric: MeasuredFabric) -> Any:
        with pytest.raises(UnresponsiveError) as caught:
            fabric.question({0: {}}, timeout_s=5.0, during="asking")
        fabric.announce({"missing": caught.value.ranks})
        return caught.value.ranks

    options = MeasureOptions(transport="gloo", start_timeout_s=6.0, silence_s=5.0, lazy=True)
    return run_on_fabric(place_of(world, world_size=3), options, work, answer=answer), heard


def test_what_is_announced_reaches_those_that_came_though_one_did_not(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(2, asked_without_the_last) == [((2,), [{"missing": [2]}]), (None, [{"missing": [2]}])]


def test_a_kept_meeting_point_outlives_the_meeting_and_serves_the_next() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = FabricPlace(rank=0, world_size=2, local_rank=0, local_world_size=1, address=f"127.0.0.1:{port}", host="n0")
    kept = keep_meeting_point(place, LAZY)
    assert kept is not None
    early = dist.TCPStore("127.0.0.1", port, is_master=False)
    met = meet(place, LAZY)
    assert met.hub is not None
    met.close()
    met.hub.stop(clean=False)
    del met
    early.set("from one who was early", "still there")
    again = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True)
    assert again.get("from one who was early") == b"still there"


def test_nobody_but_rank_0_keeps_a_meeting_point() -> None:
    here = {"world_size": 2, "local_rank": 0, "local_world_size": 1, "address": "127.0.0.1:1", "host": "n"}
    assert keep_meeting_point(FabricPlace(rank=1, **here), LAZY) is None  # type: ignore[arg-type]
    assert keep_meeting_point(FabricPlace(rank=0, agent_store=True, **here), LAZY) is None  # type: ignore[arg-type]


def differing(world: World) -> Any:
    options = MeasureOptions(transport="gloo", silence_s=5.0, lazy=world.rank == 0)
    try:
        return run_on_fabric(place_of(world), options, lambda fabric: "asked")
    except FabricError as error:
        return str(error)


def test_versions_of_torch_are_no_matter_of_the_start_where_ranks_are_asked_first(gloo_ranks: GlooPool) -> None:
    """Rank 1 says its version, and rank 0, which asks first, holds it against nobody."""
    assert gloo_ranks(2, differing)[0] == "asked"
