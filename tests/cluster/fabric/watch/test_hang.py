"""Who holds a hung run up, told from what its ranks have called."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from cluster.fabric.watch.hang import Patience, find_hangs, own_breaks, waiting_ranks
from cluster.fabric.watch.hang_findings import died
from cluster.fabric.watch.state import Break, Call, GroupCalls, Life, RankState
from tests.cluster.fabric.watch.states import LOOP, WORLD, group_of, play, state

PATIENCE = Patience(hang_seconds=8.0)
HEALTHY_STEPS = 5
PLACES = [(rank, slot) for rank in WORLD for slot in range(len(LOOP))]
OTHER = {"all_reduce": "all_gather", "all_gather": "all_reduce"}


def _programs(steps: int = HEALTHY_STEPS + 1) -> dict[int, list[tuple[str, str]]]:
    return {rank: list(LOOP) * steps for rank in WORLD}


def _number(axis: str, at: int) -> int:
    return Counter(each for each, _ in (list(LOOP) * 10)[: at + 1])[axis]


@pytest.mark.parametrize(("rank", "slot"), PLACES)
def test_a_skipped_collective_names_its_rank_and_its_number(rank: int, slot: int) -> None:
    at = HEALTHY_STEPS * len(LOOP) + slot
    programs = _programs(HEALTHY_STEPS + 3)
    axis, operation = programs[rank].pop(at)
    (finding,) = find_hangs(play(programs), PATIENCE)
    assert finding.ranks == (rank,)
    assert finding.hosts == (f"h{rank}",)
    assert (finding.evidence["axis"], finding.evidence["number"]) == (axis, _number(axis, at))
    assert operation in finding.sentence
    assert "skipped" in finding.sentence


@pytest.mark.parametrize(("rank", "slot"), PLACES)
def test_another_collective_is_a_mismatch_of_its_rank(rank: int, slot: int) -> None:
    at = HEALTHY_STEPS * len(LOOP) + slot
    programs = _programs()
    axis, operation = programs[rank][at]
    programs[rank][at] = (axis, OTHER[operation])
    (finding,) = find_hangs(play(programs), PATIENCE)
    assert finding.kind == "mismatched_collective"
    assert finding.ranks == (rank,)
    assert (finding.evidence["axis"], finding.evidence["number"]) == (axis, _number(axis, at))
    assert finding.evidence["calls"][str(rank)] == OTHER[operation]


@pytest.mark.parametrize(("rank", "slot"), PLACES)
def test_a_rank_that_never_comes_is_missing_from_the_first_collective_it_owes(rank: int, slot: int) -> None:
    at = HEALTHY_STEPS * len(LOOP) + slot
    programs = _programs()
    axis, _ = programs[rank][at]
    del programs[rank][at:]
    (finding,) = find_hangs(play(programs), PATIENCE)
    assert finding.kind == "missing_rank"
    assert finding.ranks == (rank,)
    assert (finding.evidence["axis"], finding.evidence["number"]) == (axis, _number(axis, at))
    assert finding.evidence["state"] == "idle"


@pytest.mark.parametrize(("rank", "slot"), PLACES)
@pytest.mark.parametrize("life", ["stopped", "silent", "dead", "unreachable"])
def test_a_rank_that_cannot_come_is_named_though_it_tells_nothing(rank: int, slot: int, life: Life) -> None:
    at = HEALTHY_STEPS * len(LOOP) + slot
    programs = _programs()
    axis, _ = programs[rank][at]
    del programs[rank][at:]
    states = play(programs)
    states[rank] = RankState(rank=rank, host=f"h{rank}", life=life, life_s=9.0, place=("train.py:7 f: x()",))
    (finding,) = find_hangs(states, PATIENCE)
    assert (finding.kind, finding.ranks) == ("missing_rank", (rank,))
    assert (finding.evidence["axis"], finding.evidence["number"]) == (axis, _number(axis, at))
    assert finding.evidence["state"] == life
    assert "train.py:7" in finding.sentence


def test_ranks_that_move_on_are_left_alone() -> None:
    states = play(_programs())
    moving = {rank: replace(each, quiet_s=1.0) for rank, each in states.items()}
    assert find_hangs(moving, PATIENCE) == ()
    # A collective of a thread beside the loop, such as the one that saves, may take its time while the loop goes on.
    waiting = state(0, [*LOOP, ("world", "all_gather")], waited_s=60.0)
    assert find_hangs({**moving, 0: replace(waiting, quiet_s=0.5)}, PATIENCE) == ()


def test_a_rank_that_works_has_more_patience_than_one_that_does_nothing() -> None:
    programs = _programs()
    del programs[1][-1]
    for waited_s, activity, is_told in ((9, "idle", True), (9, "working", False), (63, "working", False)):
        states = play(programs, waited_s=float(waited_s))
        states[1] = replace(states[1], activity=activity)
        assert bool(find_hangs(states, PATIENCE)) is is_told, (waited_s, activity)
    states = play(programs, waited_s=65.0)
    states[1] = replace(states[1], activity="working")
    assert find_hangs(states, PATIENCE)[0].ranks == (1,)


def test_a_usual_wait_is_no_hang_unless_something_is_plainly_wrong() -> None:
    usual = Patience(hang_seconds=8.0, usual_wait_s=30.0)
    programs = _programs()
    del programs[1][-1]
    assert find_hangs(play(programs, waited_s=40.0), usual) == ()
    assert find_hangs(play(programs, waited_s=46.0), usual)
    states = play(programs)
    states[1] = replace(states[1], life="stopped")
    assert find_hangs(states, usual)[0].ranks == (1,)


def test_a_circle_waits_for_no_late_rank_that_still_has_patience() -> None:
    programs = _programs()
    del programs[2][-1]
    states = play(programs)
    states[2] = replace(states[2], activity="working")
    assert find_hangs(states, PATIENCE) == ()


def test_two_ranks_without_a_habit_are_both_named_with_what_they_called() -> None:
    states = {rank: state(rank, [("tp", operation)]) for rank, operation in enumerate(("all_reduce", "broadcast"))}
    (finding,) = find_hangs(states, PATIENCE)
    assert finding.kind == "mismatched_collective"
    assert finding.ranks == (0, 1)
    assert finding.confidence == 0.5
    assert finding.sentence == (
        "rank 0 (h0) and rank 1 (h1) differ in collective 1 on tp: rank 0 called all_reduce; rank 1 called broadcast."
    )


def test_a_break_of_habit_that_most_ranks_share_blames_nobody() -> None:
    # All go over to a validation that they have never done; rank 3 goes past it, alone.
    programs = {rank: [*LOOP * HEALTHY_STEPS, ("world", "all_gather"), ("world", "all_reduce")] for rank in WORLD}
    programs[3] = [*LOOP * HEALTHY_STEPS, ("world", "all_reduce")]
    (finding,) = find_hangs(play(programs), PATIENCE)
    assert finding.kind == "mismatched_collective"
    assert finding.ranks == (3,)


def test_a_break_of_habit_that_is_shared_is_nobodys_own() -> None:
    due = Break(group="g", number=4, due="a", due_digest="a", came="b", is_skip=False, calls_ago=0)
    states = {rank: replace(state(rank, LOOP), breaks=(due,) if rank != 3 else ()) for rank in WORLD}
    assert own_breaks(states[0], states) == []
    alone = {rank: replace(each, breaks=(due,) if rank == 0 else ()) for rank, each in states.items()}
    assert own_breaks(alone[0], alone) == [due]


def test_different_calls_that_ended_well_are_no_mismatch() -> None:
    programs = {rank: [("tp", "all_reduce"), *LOOP * 3] for rank in WORLD}
    del programs[1][-1]
    states = play(programs)
    (group,) = (each for each in states[1].groups if each.axis == "tp")
    odd = replace(group, calls=(replace(group.calls[0], digest="all_reduce of less"), *group.calls[1:]))
    states[1] = replace(states[1], groups=tuple(odd if each is group else each for each in states[1].groups))
    (finding,) = find_hangs(states, PATIENCE)
    assert (finding.kind, finding.ranks) == ("missing_rank", (1,))


def test_all_there_and_nothing_moves_is_the_transport() -> None:
    def stuck(waited_s: float) -> dict[int, RankState]:
        return {rank: state(rank, [("world", "all_reduce")], waited_s=waited_s) for rank in WORLD}

    assert find_hangs(stuck(20.0), PATIENCE) == ()
    (finding,) = find_hangs(stuck(33.0), PATIENCE)
    assert finding.kind == "transport_fault"
    assert finding.ranks == WORLD
    assert "has not ended for 33 s" in finding.sentence


def test_of_a_collective_that_ended_for_some_the_others_are_named() -> None:
    states = {rank: state(rank, [("world", "all_reduce")], waited_s=40.0, waits=rank > 1) for rank in WORLD}
    (finding,) = find_hangs(states, PATIENCE)
    assert (finding.kind, finding.ranks) == ("transport_fault", (2, 3))


def _waits_for_message(rank: int, waited_s: float = 9.0) -> RankState:
    """gloo's recorder knows nothing of messages: the rank stands in a wait, and nothing is pending."""
    return replace(state(rank, LOOP, waits=False, waited_s=waited_s), activity="waiting")


def test_a_pipeline_that_waits_for_messages_names_the_rank_that_does_not() -> None:
    states = {rank: _waits_for_message(rank) for rank in (1, 2, 3)} | {0: state(0, LOOP, waits=False)}
    (finding,) = find_hangs(states, PATIENCE)
    assert (finding.kind, finding.ranks) == ("missing_rank", (0,))
    assert "messages from others" in finding.sentence


def test_a_rank_that_waits_for_a_message_is_not_to_blame_for_those_who_wait_for_it() -> None:
    # Rank 1 waits for a message of rank 0, which sleeps; rank 3 waits for rank 1 in a collective.
    states = {0: state(0, LOOP, waits=False), 1: _waits_for_message(1), 3: state(3, [*LOOP, ("dp", "all_reduce")])}
    states[2] = replace(states[0], rank=2, host="h2", quiet_s=2.0, activity="working")
    (finding,) = find_hangs(states, PATIENCE)
    assert finding.ranks == (0,)


def test_messages_that_the_recorder_knows_lead_to_their_other_end() -> None:
    def receiving(rank: int, peer: int) -> RankState:
        call = Call(number=1, text=f"recv {rank}<-{peer}", digest="", done=False, age_s=9.0, peer=peer)
        group = GroupCalls(name="pp", axis="pp", ranks=(0, 1, 2), calls=(call,))
        return replace(state(rank, [], waits=False), activity="waiting", groups=(group,))

    states = {2: receiving(2, 1), 1: receiving(1, 0), 0: state(0, [], waits=False)}
    (finding,) = find_hangs(states, PATIENCE)
    assert finding.ranks == (0,)
    assert "a message on pp (recv 1<-0)" in finding.sentence


def test_every_rank_in_wait_for_a_message_is_told_at_last() -> None:
    assert find_hangs({rank: _waits_for_message(rank) for rank in WORLD}, PATIENCE) == ()
    (finding,) = find_hangs({rank: _waits_for_message(rank, 40.0) for rank in WORLD}, PATIENCE)
    assert (finding.kind, finding.ranks) == ("transport_fault", WORLD)


def test_one_that_left_in_good_order_while_others_wait_for_it_is_named() -> None:
    programs = _programs()
    del programs[3][-1]
    states = play(programs)
    states[3] = replace(states[3], life="ended", groups=())
    (finding,) = find_hangs(states, PATIENCE)
    assert finding.ranks == (3,)
    assert "has ended in good order" in finding.sentence


def test_one_that_never_reported_has_the_patience_of_a_start() -> None:
    def states(waited_s: float) -> dict[int, RankState]:
        others = {rank: state(rank, [("world", "all_reduce")], waited_s=waited_s) for rank in (0, 1, 2)}
        return {**others, 3: RankState(rank=3, host="rank 3", life="starting", life_s=waited_s)}

    assert find_hangs(states(20.0), PATIENCE) == ()
    assert find_hangs(states(65.0), PATIENCE)[0].ranks == (3,)


def test_who_waits() -> None:
    programs = _programs()
    del programs[1][-1]
    states = play(programs, waited_s=5.0)
    assert waiting_ranks(states, 4.0) == (0,)
    assert waiting_ranks(states, 6.0) == ()
    assert group_of(0, "tp") == (0, 1)


MANY = 1024
MOST_PYTHON_CALLS = 1_000_000
"""About 400 a rank are needed; looking at all ranks for each rank would take a hundred times as many as this."""


def _crowd(*, late: int, life: Life = "running", in_step: bool = True) -> dict[int, RankState]:
    """1,024 ranks in one group, of which one is a call behind, elsewhere or in another group's call."""
    everyone = tuple(range(MANY))

    def calls(last: int, *, done: bool) -> tuple[Call, ...]:
        return tuple(
            Call(
                number=number, text="sum", digest="sum", done=done or number < last, age_s=9.0 + 0.01 * (last - number)
            )
            for number in range(last - 31, last + 1)
        )

    behind, ahead, other = calls(99, done=True), calls(100, done=False), calls(50, done=False)
    pair = (late, (late + 1) % MANY)
    states = {}
    for rank in everyone:
        groups = [GroupCalls(name="world", axis="world", ranks=everyone, calls=behind if rank == late else ahead)]
        if rank == late and not in_step:
            groups.append(GroupCalls(name="pair", axis="pair", ranks=pair, calls=other))
        states[rank] = RankState(
            rank=rank,
            host=f"h{rank}",
            life=life if rank == late else "running",
            life_s=9.0,
            quiet_s=9.0,
            activity="idle",
            groups=tuple(groups),
        )
    return states


@contextlib.contextmanager
def _bounded_work() -> Iterator[None]:
    events = 0

    def count(*_: object) -> None:
        nonlocal events
        events += 1
        if events > MOST_PYTHON_CALLS:
            raise AssertionError(f"more than {MOST_PYTHON_CALLS} calls and returns for {MANY} ranks")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)


@pytest.mark.parametrize("facts", [{}, {"life": "stopped"}, {"in_step": False}])
def test_a_large_run_is_judged_in_a_time_that_grows_with_its_ranks_alone(facts: dict[str, Any]) -> None:
    states = _crowd(late=700, **facts)
    with _bounded_work():
        (finding,) = find_hangs(states, PATIENCE)
    assert finding.ranks == (700,)
    assert (finding.evidence["axis"], finding.evidence["number"]) == ("world", 100)
    assert len(finding.evidence["waiting_ranks"]) == MANY - 1


def test_a_death_in_a_large_run_is_told_in_such_a_time() -> None:
    states = _crowd(late=700, life="dead")
    with _bounded_work():
        finding = died(states.pop(700), states)
    assert finding.evidence["number"] == 100
