"""A rank that leaves its own habit."""

from __future__ import annotations

from cluster.fabric.watch.habits import HabitualCall, find_breaks

STEP = "abcd"


def _calls(letters: str) -> list[HabitualCall]:
    """Each letter an operation; capital letters on another group."""
    calls = []
    for at, letter in enumerate(letters):
        group = "G" if letter.isupper() else "g"
        number = sum((each.isupper()) == letter.isupper() for each in letters[: at + 1])
        calls.append(HabitualCall(group=group, axis=group, number=number, text=letter, digest=letter))
    return calls


def test_a_loop_has_no_break() -> None:
    assert find_breaks(_calls(STEP * 8)) == ()
    assert find_breaks(_calls("abcd" * 3 + "abxd" * 3)) != ()  # until it is a habit
    assert find_breaks(_calls("xyz" + "abcd" * 20)) == ()  # what came before the loop is no break of it


def test_a_skipped_call_was_due() -> None:
    (found,) = find_breaks(_calls(STEP * 4 + "abd"))
    assert (found.due, found.came, found.number, found.calls_ago) == ("c", "d", 19, 0)


def test_a_different_call_came_in_the_place_of_the_due_one() -> None:
    (found,) = find_breaks(_calls("abcD" * 4 + "abD"))
    assert (found.due, found.came, found.group) == ("c", "D on G", "g")


def test_two_beginnings_teach_nothing() -> None:
    assert find_breaks(_calls("abcdabcx")) == ()


def test_a_break_of_long_ago_is_forgotten() -> None:
    assert find_breaks(_calls(STEP * 4 + "abd" + STEP * 10)) == ()
