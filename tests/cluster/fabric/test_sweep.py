"""The sweep on collectives whose alpha and beta are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import FabricError
from cluster.fabric.bandwidth import bandwidth
from cluster.fabric.groups import GroupSet, mesh_groups, rail_groups, world_group
from cluster.fabric.measured.fabric import CollectiveTimes
from cluster.fabric.measured.transport import COLLECTIVE_KINDS
from cluster.fabric.probing import Endpoint
from cluster.fabric.sweep import SweepPlan, SweepResult, read_sweep, sweep
from tests.cluster.fabric.collectives import NOON, SIZES, FakeCollectives, swept


def test_every_kind_and_size_has_a_row_with_its_bandwidths() -> None:
    result = swept(FakeCollectives())
    assert {row.kind for row in result.rows} == set(COLLECTIVE_KINDS)
    assert len(result.rows) == len(COLLECTIVE_KINDS) * len(SIZES)
    for row in result.rows:
        expected = bandwidth(row.kind, row.num_bytes, 8, row.times.median_s)
        assert row.algbw_bytes_per_s == expected.algbw_bytes_per_s
        assert row.busbw_bytes_per_s == expected.busbw_bytes_per_s
    assert result.correct
    assert (result.transport, result.world_size, result.hosts[0]) == ("gloo", 8, "h0")
    assert result.taken_at == "2026-11-16T12:00:00+00:00"


def test_alpha_and_beta_of_each_group_and_kind_come_back() -> None:
    result = swept(FakeCollectives(noise=0.02, seed=3), world_group(8), *mesh_groups("dp=4,tp=2", 8))
    assert len(result.fits) == len(COLLECTIVE_KINDS) * (1 + 2 + 2)
    for fit in result.fits:
        assert fit.model.alpha_s.value == pytest.approx(20e-6, rel=0.1), fit
        assert fit.model.beta_s_per_byte.value == pytest.approx(1e-9, rel=0.1), fit
        assert fit.model.beta_s_per_byte.low is not None


def test_a_set_of_groups_is_measured_one_by_one_and_together() -> None:
    fabric = FakeCollectives(together_slowness=3.0)
    (tensor,) = mesh_groups("tp=2,dp=4", 8)[1:]
    plan = SweepPlan(groups=(tensor,), sizes=(1 << 20,), kinds=("all_reduce",), passes=1)
    alone, together = sweep(fabric, plan, taken_at=NOON).rows
    assert [call[2] for call in fabric.calls] == [1, 1, 1, 1, 4]
    assert (alone.mode, alone.num_groups) == ("isolated", 4)
    assert (together.mode, together.num_groups) == ("together", 4)
    assert together.times.median_s > 2.5 * alone.times.median_s


def test_many_groups_are_sampled_in_isolation() -> None:
    fabric = FakeCollectives(world_size=64)
    (tensor,) = mesh_groups("tp=2,dp=32", 64)[1:]
    plan = SweepPlan(groups=(tensor,), sizes=(1024,), kinds=("all_reduce",), modes=("isolated",), isolated_at_most=4)
    (row,) = sweep(fabric, plan, taken_at=NOON).rows
    assert row.num_groups == 4
    assert row.slowest_ranks in tensor.groups


def test_the_slowest_group_of_a_set_is_named() -> None:
    fabric = FakeCollectives(slow={(4, 5): 2.0})
    (tensor,) = mesh_groups("tp=2,dp=4", 8)[1:]
    plan = SweepPlan(groups=(tensor,), sizes=(1 << 22,), kinds=("broadcast",), iterations=5)
    for row in sweep(fabric, plan, taken_at=NOON).rows:
        assert row.slowest_ranks == (4, 5)
        assert row.slowest_s is not None
        assert row.slowest_s > 1.9 * row.times.median_s


def test_compute_beside_it_is_a_mode_of_its_own_and_one_group_is_never_together() -> None:
    fabric = FakeCollectives(compute_slowness=2.0)
    plan = SweepPlan(
        groups=(world_group(8),),
        sizes=(1 << 22,),
        kinds=("all_reduce",),
        modes=("isolated", "together", "with_compute"),
        passes=1,
    )
    alone, computing = sweep(fabric, plan, taken_at=NOON).rows
    assert (alone.mode, computing.mode) == ("isolated", "with_compute")
    assert [call[4] for call in fabric.calls] == [False, True]
    assert computing.times.median_s > 1.9 * alone.times.median_s


def test_rails_are_measured_alone_once_and_then_all_together() -> None:
    ends = [Endpoint(rank=rank, host=f"h{rank // 2}", machine="m", rail=rank % 2) for rank in range(8)]
    plan = SweepPlan(groups=rail_groups(ends), sizes=(1024,), kinds=("all_reduce",))
    rows = sweep(FakeCollectives(), plan, taken_at=NOON).rows
    assert [(row.group, row.mode) for row in rows] == [
        ("rail 0", "isolated"),
        ("rail 1", "isolated"),
        ("rails", "together"),
    ]


def test_sizes_that_round_to_the_same_are_measured_once_and_groups_of_one_rank_never() -> None:
    plan = SweepPlan(groups=(world_group(8), GroupSet(name="alone", groups=((0,),))), sizes=(4, 8, 64, 4096))
    rows = sweep(FakeCollectives(), plan, taken_at=NOON).rows
    assert [row.num_bytes for row in rows if row.kind == "all_gather"] == [128, 4096]
    assert {row.group for row in rows} == {"world"}


def test_large_sizes_get_fewer_iterations_but_never_fewer_than_five() -> None:
    fabric = FakeCollectives(beta_s_per_byte=1e-7)
    plan = SweepPlan(groups=(world_group(8),), sizes=SIZES, kinds=("all_reduce",), iterations=20, passes=1)
    sweep(fabric, plan, taken_at=NOON)
    iterations = [call[3] for call in fabric.calls]
    assert iterations[0] == 20
    assert iterations[-1] == 5
    assert iterations == sorted(iterations, reverse=True)
    large = SweepPlan(groups=(world_group(8),), sizes=(1 << 28,), kinds=("all_reduce",), iterations=20, passes=1)
    sweep(fabric, large, taken_at=NOON)
    assert fabric.calls[-1][3] == 5


def test_a_slow_moment_does_not_fall_on_one_row_alone() -> None:
    """The first pass happens to be ten times as slow; the others outvote it."""

    class Starved(FakeCollectives):
        def collective(self, *args: Any, **options: Any) -> CollectiveTimes:
            times = super().collective(*args, **options)
            return replace(times, seconds=times.seconds * (10 if len(self.calls) <= 2 else 1))

    fabric = Starved(noise=0.01)
    plan = SweepPlan(groups=(world_group(8),), sizes=(1024, 4096), kinds=("all_reduce",), iterations=20, passes=3)
    rows = sweep(fabric, plan, taken_at=NOON).rows
    assert [call[1] for call in fabric.calls] == [1024, 4096] * 3
    assert [call[3] for call in fabric.calls] == [7] * 6
    usual = FakeCollectives(noise=0.01)
    for row, quiet in zip(rows, sweep(usual, plan, taken_at=NOON).rows, strict=True):
        assert row.times.median_s < 1.05 * quiet.times.median_s
        assert row.times.p99_s > 9 * quiet.times.median_s


def test_times_are_over_ranks_and_iterations() -> None:
    result = swept(FakeCollectives(noise=0.1, seed=1))
    for row in result.rows:
        assert row.times.min_s < row.times.median_s < row.times.p99_s
        assert 0.005 < row.times.noise_share < 0.15  # 10 % over ten iterations: about 4 %


def test_wrong_data_show_and_rows_are_told_as_they_come() -> None:
    told = []
    plan = SweepPlan(groups=(world_group(4),), sizes=(1024,))
    result = sweep(FakeCollectives(world_size=4, wrong="all_to_all"), plan, taken_at=NOON, tell=told.append)
    assert tuple(told) == result.rows  # once each, not in every pass
    assert [row.kind for row in result.rows if not row.correct] == ["all_to_all"]
    assert not result.correct


def test_a_result_survives_json_with_more_keys_beside_it() -> None:
    result = replace(swept(FakeCollectives(noise=0.05), *mesh_groups("tp=2,dp=4", 8)), circumstances={"torch": "2.13"})
    data = json.loads(json.dumps({**result.as_data(), "command": "mega fabric sweep"}))
    assert SweepResult.from_data(data) == result


def test_a_file_that_is_no_sweep_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    with pytest.raises(FabricError, match=r"sweep.json cannot be read \(No such file or directory\)"):
        read_sweep(path)
    for text in ("{}", "[]", "{", '{"rows": [{}]}', '"text"'):
        path.write_text(text)
        with pytest.raises(FabricError, match=r"sweep.json is not what `mega fabric sweep --output` writes"):
            read_sweep(path)
    result = swept(FakeCollectives())
    path.write_text(json.dumps(result.as_data()))
    assert read_sweep(path) == result
