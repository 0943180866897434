"""What a rank tells: short, the same to the microsecond at the other end, and cut alike on all ranks."""

from __future__ import annotations

import json

from cluster.fabric.monitor.durations import MOST_ENTRIES, RankLists, Record, StepDurations, group_durations


def _records(seconds: list[float | None], kind: str = "all_reduce") -> list[Record]:
    return [
        Record(group="g", kind=kind, num_bytes=10, started=0.0, seconds=each, waited_s=(each or 0.0) / 2)
        for each in seconds
    ]


def test_a_message_says_the_same_at_the_other_end() -> None:
    told = StepDurations(
        step=7,
        role="stage 1",
        step_s=0.25,
        busy_s=0.125,
        every=4,
        cost_s=0.001,
        groups=(group_durations("tp", (2, 3), _records([0.001, None, 0.002])),),
    )
    assert StepDurations.from_payload(json.loads(json.dumps(told.as_payload(RankLists()))), RankLists()) == told
    assert told.groups[0].seconds == (0.001, None, 0.002)
    assert told.groups[0].waited_s == 0.0015


def test_many_collectives_are_summed_with_neighbours_of_their_kind() -> None:
    mixed = [record for pair in zip(_records([0.001] * 500), _records([0.002] * 500, "all_gather")) for record in pair]
    told = group_durations("tp", (0, 1), mixed)
    assert len(told.kinds) <= MOST_ENTRIES
    assert set(told.kinds) == {"all_reduce", "all_gather"}
    assert sum(told.num_bytes) == 10_000
    total = sum(seconds for seconds in told.seconds if seconds is not None)
    assert abs(total - 1.5) < 1e-9
    # One whose end was not seen spoils only the sum that it is in.
    mixed[3].seconds = None
    assert group_durations("tp", (0, 1), mixed).seconds.count(None) == 1


def test_a_world_of_thousands_fits_into_a_short_message() -> None:
    lists = RankLists()
    groups = tuple(
        group_durations(axis, ranks, _records([0.001] * 4))
        for axis, ranks in (("world", tuple(range(4096))), ("dp", tuple(range(3, 4096, 8))))
    )
    told = StepDurations(step=1, role="stage 0", step_s=1.0, busy_s=None, every=1, cost_s=0.0, groups=groups)
    message = json.dumps(told.as_payload(lists))
    assert len(message) < 1000
    head = RankLists()
    received = [StepDurations.from_payload(json.loads(message), head) for _ in range(2)]
    assert received[0].groups == groups
    assert received[0].groups[0].ranks is received[1].groups[0].ranks
