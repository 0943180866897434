"""Groups of a mesh and of rails."""

from __future__ import annotations

import pytest

from cluster.errors import FabricError
from cluster.fabric.groups import flattened_axes, mesh_groups, rail_groups, world_group
from cluster.fabric.probing import Endpoint


def test_neighbours_in_rank_are_on_the_last_axis_however_the_mesh_is_written() -> None:
    for mesh in ("tp=2,dp=4", "dp=4, tp=2"):
        data, tensor = mesh_groups(mesh, 8)
        assert (data.name, data.groups) == ("dp", ((0, 2, 4, 6), (1, 3, 5, 7)))
        assert (tensor.name, tensor.groups) == ("tp", ((0, 1), (2, 3), (4, 5), (6, 7)))


def test_axes_of_one_rank_are_left_out_and_flattened_ones_come_by_name() -> None:
    sets = mesh_groups("pp=2,dp_shard=2,cp=2,tp=1,dp_shard_cp", 8)
    assert [each.name for each in sets] == ["pp", "dp_shard", "cp", "dp_shard_cp"]
    assert sets[0].groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert sets[3].groups == ((0, 1, 2, 3), (4, 5, 6, 7))


def test_the_experts_grid_folds_the_same_ranks() -> None:
    sets = mesh_groups("edp_shard=2,ep=2,expert_tp=2", 8)
    assert {each.name: each.groups[0] for each in sets} == {"edp_shard": (0, 4), "ep": (0, 2), "expert_tp": (0, 1)}


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tp=2,dp=2", "--mesh tp=2,dp=2: these axes make 4 ranks, and there are 8"),
        ("tp=8,tq=1", "--mesh tp=8,tq=1: 'tq' is no axis of a mesh: known are pp, "),
        ("tp=x", "--mesh tp=x: the size of tp is 'x': give a whole number above zero"),
        ("tp=0", "--mesh tp=0: the size of tp is '0': give a whole number above zero"),
        ("tp=8,cp_tp", "--mesh tp=8,cp_tp: 'cp_tp' is no axis with a size, nor axes of this mesh joined by '_'"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_in_one_line(mesh: str, message: str) -> None:
    with pytest.raises(FabricError) as refused:
        mesh_groups(mesh, 8)
    assert message in str(refused.value)


def test_names_of_flattened_axes_come_apart() -> None:
    assert flattened_axes("dp_replicate_dp_shard_cp_tp") == ("dp_replicate", "dp_shard", "cp", "tp")
    assert flattened_axes("ep_expert_tp") == ("ep", "expert_tp")
    assert flattened_axes("pp_tied") is None


def _endpoints(rails: dict[str, int]) -> list[Endpoint]:
    places = [(host, rail) for host, count in rails.items() for rail in range(count)]
    return [Endpoint(rank=rank, host=host, machine=host, rail=rail) for rank, (host, rail) in enumerate(places)]


def test_every_rail_is_a_set_and_all_of_them_are_one() -> None:
    first, second, both = rail_groups(_endpoints({"a": 2, "b": 2, "c": 2}))
    assert (first.name, first.groups) == ("rail 0", ((0, 2, 4),))
    assert (second.name, second.groups) == ("rail 1", ((1, 3, 5),))
    assert (both.name, both.groups, both.only_together) == ("rails", ((0, 2, 4), (1, 3, 5)), True)


def test_rails_of_unlike_length_stay_apart_and_one_rail_is_none() -> None:
    assert [each.name for each in rail_groups(_endpoints({"a": 2, "b": 2, "c": 1}))] == ["rail 0", "rail 1"]
    assert rail_groups(_endpoints({"a": 1, "b": 1})) == ()
    assert rail_groups(_endpoints({"a": 4})) == ()


def test_the_world_is_one_group() -> None:
    assert world_group(3).groups == ((0, 1, 2),)
