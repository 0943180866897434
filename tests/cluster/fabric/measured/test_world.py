"""What rank 0 makes of what ranks say of themselves."""

from typing import Any

import pytest

from cluster.errors import FabricError
from cluster.fabric.measured.world import choose_transport, endpoints_of, require_agreement


def _hello(
    host: str, *, local_rank: int = 0, device: bool = False, torch: str = "2.13.0", leaf: str | None = None
) -> dict[str, Any]:
    return {
        "host": host,
        "machine": f"machine of {host}",
        "local_rank": local_rank,
        "leaf": leaf,
        "has_device": device,
        "agreed": {"torch": torch, "ranks": 4},
    }


def _two_hosts() -> dict[int, dict[str, Any]]:
    return {rank: _hello(f"n{rank // 2}", local_rank=rank % 2) for rank in range(4)}


def test_one_rank_of_each_host_measures() -> None:
    assert [(one.rank, one.host) for one in endpoints_of(_two_hosts(), rails=False)] == [(0, "n0"), (2, "n1")]


def test_with_rails_every_rank_measures() -> None:
    ends = endpoints_of(_two_hosts(), rails=True)
    assert [(one.rank, one.host, one.rail) for one in ends] == [(0, "n0", 0), (1, "n0", 1), (2, "n1", 0), (3, "n1", 1)]


@pytest.mark.parametrize("rails", [False, True])
def test_an_endpoint_has_the_leaf_switch_that_its_rank_told(rails: bool) -> None:
    hellos = {0: _hello("n0", leaf="s1"), 1: _hello("n1", leaf="s2"), 2: _hello("n2")}
    ends = endpoints_of(hellos, rails=rails, missing=(3,), hosts=("n0", "n1", "n2", "n3"))
    assert [one.leaf for one in ends] == ["s1", "s2", None, None]


def test_ranks_of_one_host_alone_stand_for_hosts() -> None:
    ends = endpoints_of({rank: _hello("laptop", local_rank=rank) for rank in range(3)}, rails=False)
    assert [one.host for one in ends] == ["laptop:0", "laptop:1", "laptop:2"]
    assert len({one.machine for one in ends}) == 1


def test_a_rank_that_never_came_has_a_host_where_the_launcher_knew_it() -> None:
    hellos = {0: _hello("n0"), 2: _hello("n2")}
    assert [one.host for one in endpoints_of(hellos, rails=False, missing=(1,), hosts=("n0", "n1", "n2"))] == [
        "n0",
        "n1",
        "n2",
    ]
    assert [one.rank for one in endpoints_of(hellos, rails=False, missing=(1,))] == [0, 2]


def test_nccl_needs_a_device_for_each_rank() -> None:
    mixed = {0: _hello("n0", device=True), 1: _hello("n1")}
    assert choose_transport(mixed, "auto") == "gloo"
    assert choose_transport({0: _hello("n0", device=True)}, "auto") == "nccl"
    assert choose_transport(mixed, "mpi") == "mpi"
    with pytest.raises(FabricError, match=r"rank\(s\) 1 \(n1\) have none: measure over gloo"):
        choose_transport(mixed, "nccl")


def test_ranks_that_differ_are_named_with_what_differs() -> None:
    hellos = {0: _hello("n0"), 1: _hello("n1", torch="2.11.0"), 2: _hello("n2"), 3: _hello("n3", torch="2.11.0")}
    with pytest.raises(
        FabricError, match=r"torch is 2\.11\.0 on rank\(s\) 1, 3 \(n1, n3\), and 2\.13\.0 on rank 0 \(n0\)"
    ):
        require_agreement(hellos)
    require_agreement({0: _hello("n0"), 1: _hello("n1")})
