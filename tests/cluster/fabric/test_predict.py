"""What a step's communication should cost, and how the difference is told."""

from __future__ import annotations

import json

import pytest

from cluster.fabric.bandwidth import Interval, bus_factor, message_steps
from cluster.fabric.groups import mesh_groups, world_group
from cluster.fabric.measured.transport import CollectiveKind
from cluster.fabric.predict import (
    CommunicationRow,
    Difference,
    ExpectedTime,
    MeasuredTime,
    Prediction,
    compare,
    compare_step,
    predict,
)
from cluster.fabric.sweep import SweepPlan, SweepResult, sweep
from tests.cluster.fabric.collectives import NOON, SIZES, FakeCollectives, swept

ALPHA, BETA = 20e-6, 1e-9


def _cost(kind: str, ranks: int, count: float, num_bytes: float, beta: float = BETA) -> float:
    return count * message_steps(kind, ranks) * ALPHA + bus_factor(kind, ranks) * num_bytes * beta


def _row(axis: str, kind: str, count: float, num_bytes: float, group_size: int) -> CommunicationRow:
    return CommunicationRow(axis=axis, kind=kind, count=count, num_bytes=num_bytes, group_size=group_size)


@pytest.fixture(scope="module")
def profile() -> SweepResult:
    return swept(FakeCollectives(), world_group(8), *mesh_groups("dp_shard=4,tp=2", 8))


@pytest.mark.parametrize(
    ("row", "kind", "source"),
    [
        (_row("tp", "all_gather", 12, 3e6, 2), "all_gather", "all_gather on tp, together"),
        (_row("dp_shard", "reduce_scatter", 3, 9e6, 4), "reduce_scatter", "reduce_scatter on dp_shard, together"),
        (_row("dp_shard_cp", "all_gather", 3, 9e6, 4), "all_gather", "all_gather on dp_shard, together"),
        (_row("world", "all_reduce", 1, 4, 8), "all_reduce", "all_reduce on world, isolated"),
        (_row("cp", "all_to_all", 8, 1e6, 2), "all_to_all", "all_to_all on world, isolated, standing in"),
        (_row("tp", "reduce", 2, 1e6, 2), "reduce", "all_gather on tp, together, standing in"),
        (_row("pp", "send", 4, 4e6, 2), "send_recv", "send_recv on world, isolated, standing in"),
        (_row("pp", "recv", 4, 4e6, 2), "send_recv", "send_recv on world, isolated, standing in"),
        (_row("control", "broadcast", 1, 100, 8), "broadcast", "broadcast on world, isolated"),
    ],
)
def test_a_row_costs_what_alpha_and_beta_of_its_group_say(
    profile: SweepResult, row: CommunicationRow, kind: str, source: str
) -> None:
    (expected,) = predict(profile, [row]).rows
    assert expected.source == source
    assert expected.seconds is not None
    assert expected.seconds.value == pytest.approx(_cost(kind, row.group_size, row.count, row.num_bytes), rel=1e-6)


def test_a_barrier_costs_its_messages_and_a_gather_the_parts_of_all(profile: SweepResult) -> None:
    barrier, gather = predict(profile, [_row("world", "barrier", 2, 0, 8), _row("world", "gather", 1, 1e6, 8)]).rows
    assert barrier.seconds is not None
    assert barrier.seconds.value == pytest.approx(2 * 14 * ALPHA)
    assert gather.seconds is not None
    assert gather.seconds.value == pytest.approx(7 * ALPHA + 7e6 * BETA)


def test_groups_of_an_axis_are_not_taken_for_those_of_another(profile: SweepResult) -> None:
    (expected,) = predict(profile, [_row("dp_shard_cp", "all_gather", 3, 9e6, 8)]).rows  # cp has two ranks here
    assert expected.source == "all_gather on world, isolated"


def test_data_parallelism_of_either_kind_finds_the_sweep_of_dp() -> None:
    profile = swept(FakeCollectives(), *mesh_groups("dp=4,tp=2", 8))
    for axis in ("dp_shard", "dp_replicate", "dp_replicate_dp_shard_cp"):
        (expected,) = predict(profile, [_row(axis, "all_reduce", 1, 1e6, 4)]).rows
        assert expected.source == "all_reduce on dp, together"


def test_what_the_sweep_cannot_know_stays_open(profile: SweepResult) -> None:
    nccl = swept(FakeCollectives(transport="nccl"))
    rows = [_row("control", "broadcast", 1, 100, 8), _row("tp", "all_gather", 0, 0, 1), _row("tp", "teleport", 1, 8, 2)]
    for row in rows:
        assert predict(nccl, [row]).rows[0].seconds is None
    without_world = swept(FakeCollectives(), *mesh_groups("dp=4,tp=2", 8))
    assert predict(without_world, [_row("pp", "send", 1, 8, 2)]).rows[0].seconds is None


def test_groups_at_once_count_before_one_alone_unless_asked_otherwise() -> None:
    fabric = FakeCollectives(together_slowness=3.0)
    profile = swept(fabric, *mesh_groups("dp=4,tp=2", 8))
    row = _row("tp", "all_reduce", 1, 1e7, 2)
    for modes, beta in ((("together", "isolated"), 3 * BETA), (("isolated",), BETA)):
        (expected,) = predict(profile, [row], modes=modes).rows  # type: ignore[arg-type]
        assert expected.seconds is not None
        assert expected.seconds.value == pytest.approx(_cost("all_reduce", 2, 1, 1e7, beta))


def test_a_kind_that_was_not_measured_takes_one_that_was() -> None:
    kinds: tuple[CollectiveKind, ...] = ("all_reduce",)
    plan = SweepPlan(groups=(world_group(4),), sizes=SIZES, kinds=kinds)
    profile = sweep(FakeCollectives(world_size=4), plan, taken_at=NOON)
    (expected,) = predict(profile, [_row("world", "reduce_scatter", 1, 1e6, 4)]).rows
    assert expected.source == "all_reduce on world, isolated, standing in"
    assert expected.seconds is not None
    assert expected.seconds.value == pytest.approx(_cost("reduce_scatter", 4, 1, 1e6))


def test_a_step_is_the_sum_but_sends_run_beside_receives(profile: SweepResult) -> None:
    rows = [
        _row("tp", "all_gather", 2, 1e6, 2),
        _row("tp", "reduce_scatter", 2, 1e6, 2),
        _row("pp", "send", 4, 4e6, 2),
        _row("pp", "recv", 4, 4e6, 2),
    ]
    prediction = predict(profile, rows)
    tensor = 2 * _cost("all_gather", 2, 2, 1e6)
    pipeline = _cost("send_recv", 2, 4, 4e6)
    assert prediction.by_axis == pytest.approx({"tp": tensor, "pp": pipeline})
    assert prediction.seconds == pytest.approx(tensor + pipeline)
    json.dumps(prediction.as_data())


def test_the_interval_follows_the_noise() -> None:
    width = {}
    for noise in (0.02, 0.2):
        profile = swept(FakeCollectives(noise=noise, seed=4))
        (expected,) = predict(profile, [_row("world", "all_reduce", 1, 1e6, 8)]).rows
        assert expected.seconds is not None
        assert expected.seconds.reach is not None
        width[noise] = expected.seconds.reach / expected.seconds.value
    assert 0 < width[0.02] < 0.5 * width[0.2]


def _expected(seconds: Interval | None, axis: str = "tp", kind: str = "all_gather") -> Prediction:
    return Prediction(rows=(ExpectedTime(row=_row(axis, kind, 1, 1, 2), seconds=seconds, source=None),))


def _one(expected: Prediction, measured_s: float | None) -> Difference:
    measured = [] if measured_s is None else [MeasuredTime(axis="tp", kind="all_gather", seconds=measured_s)]
    (difference,) = compare(expected, measured)
    return difference


@pytest.mark.parametrize(
    ("expected", "measured_s", "sentence", "notable"),
    [
        ((3.1e-3, 3.0e-3, 3.2e-3), 5.2e-3, "all_gather on tp: 3.10 ms expected, 5.20 ms measured (+68 %)", True),
        ((3.1e-3, 3.0e-3, 3.2e-3), 3.3e-3, "all_gather on tp: 3.10 ms expected, 3.30 ms measured (+6 %)", False),
        ((3.1e-3, 1.0e-3, 5.2e-3), 4.6e-3, "all_gather on tp: 3.10 ms expected, 4.60 ms measured (+48 %)", False),
        ((3.1e-3, 3.0e-3, 3.2e-3), 1.55e-3, "all_gather on tp: 3.10 ms expected, 1.55 ms measured (-50 %)", True),
        ((90e-6, None, None), 110e-6, "all_gather on tp: 90.0 us expected, 110 us measured (+22 %)", True),
        ((1.2, 1.0, 1.4), None, "all_gather on tp: 1.20 s expected, not measured", False),
        (None, 2e-3, "all_gather on tp: 2.00 ms measured, nothing to expect it by", False),
    ],
)
def test_the_difference_is_named(
    expected: tuple[float, float | None, float | None] | None, measured_s: float | None, sentence: str, notable: bool
) -> None:
    interval = None if expected is None else Interval(value=expected[0], low=expected[1], high=expected[2])
    difference = _one(_expected(interval), measured_s)
    assert difference.sentence == sentence
    assert difference.notable is notable
    json.dumps(difference.as_data())


def test_rows_of_one_axis_and_kind_are_told_together_in_order(profile: SweepResult) -> None:
    rows = [_row("tp", "all_gather", 1, 1e6, 2), _row("tp", "all_gather", 3, 2e6, 2), _row("pp", "send", 1, 10, 2)]
    measured = [MeasuredTime(axis="tp", kind="all_gather", seconds=each) for each in (1e-3, 2e-3)]
    first, second = compare(predict(profile, rows), measured)
    assert (first.axis, first.kind, first.measured_s) == ("pp", "send", None)
    assert second.measured_s == pytest.approx(3e-3)
    assert second.expected is not None
    assert second.expected.value == pytest.approx(_cost("all_gather", 2, 4, 3e6))
    assert second.expected.low is not None


def test_the_whole_step_is_told_unless_a_part_of_it_is_unknown(profile: SweepResult) -> None:
    rows = [_row("tp", "all_gather", 1, 2e6, 2)]
    told = compare_step(predict(profile, rows), 2.04e-3)
    assert told.sentence == "communication on all axes: 1.02 ms expected, 2.04 ms measured (+100 %)"
    assert told.notable
    unknown = compare_step(_expected(None), 2.04e-3)
    assert unknown.sentence == "communication on all axes: 2.04 ms measured, nothing to expect it by"
