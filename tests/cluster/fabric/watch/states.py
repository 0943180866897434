"""States of ranks as the watch would see them, made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.fabric.watch.habits import HabitualCall, find_breaks
from cluster.fabric.watch.state import Call, GroupCalls, RankState

WORLD = (0, 1, 2, 3)
GROUPS = {
    "world": (WORLD,),
    "tp": ((0, 1), (2, 3)),
    "dp": ((0, 2), (1, 3)),
}
LOOP = (("world", "all_reduce"), ("tp", "all_gather"), ("dp", "all_reduce"), ("tp", "all_reduce"))
"""One step's calls."""


def group_of(rank: int, axis: str) -> tuple[int, ...]:
    """The ranks of a rank's group along an axis."""
    return next(members for members in GROUPS[axis] if rank in members)


def state(
    rank: int,
    program: Sequence[tuple[str, str]],
    *,
    waits: bool = True,
    waited_s: float = 9.0,
    **more: Any,
) -> RankState:
    """A rank that has called `program` (axis, operation), and hangs in the last of it where it `waits`."""
    calls: dict[str, list[Call]] = {axis: [] for axis in GROUPS}
    habitual = []
    for at, (axis, operation) in enumerate(program):
        is_last = at == len(program) - 1
        number = len(calls[axis]) + 1
        age_s = waited_s + 0.001 * (len(program) - at)
        done = not (waits and is_last)
        calls[axis].append(Call(number=number, text=operation, digest=operation, done=done, age_s=age_s))
        name = f"{axis}-{group_of(rank, axis)}"
        habitual.append(HabitualCall(group=name, axis=axis, number=number, text=operation, digest=operation))
    groups = tuple(
        GroupCalls(
            name=f"{axis}-{group_of(rank, axis)}", axis=axis, ranks=group_of(rank, axis), calls=tuple(made[-32:])
        )
        for axis, made in calls.items()
    )
    facts: dict[str, Any] = {
        "life": "running",
        "life_s": 100.0,
        "quiet_s": waited_s,
        "activity": "waiting" if waits else "idle",
        "groups": groups,
        "breaks": find_breaks(habitual),
    }
    return RankState(rank=rank, host=f"h{rank}", **{**facts, **more})


def play(programs: Mapping[int, Sequence[tuple[str, str]]], **more: Any) -> dict[int, RankState]:
    """Runs programs of collectives until nobody can go on, as ranks would: each call ends when its group has made it.

    A rank that has ended its program is idle. Calls of other operations under one number never end.
    """
    called: dict[int, list[tuple[str, str]]] = {rank: [] for rank in programs}
    entered: dict[tuple[str, tuple[int, ...]], dict[int, list[str]]] = {}
    blocked: dict[int, bool] = dict.fromkeys(programs, False)
    moved = True
    while moved:
        moved = False
        for rank, program in programs.items():
            if not blocked[rank] and len(called[rank]) < len(program):
                axis, operation = program[len(called[rank])]
                called[rank].append((axis, operation))
                entered.setdefault((axis, group_of(rank, axis)), {}).setdefault(rank, []).append(operation)
                blocked[rank] = moved = True
            if blocked[rank]:
                axis, operation = called[rank][-1]
                members = group_of(rank, axis)
                number = sum(each == axis for each, _ in called[rank])
                made = [entered[axis, members].get(member, [])[number - 1 : number] for member in members]
                if all(each == [operation] for each in made):
                    blocked[rank] = False
                    moved = True
    return {rank: state(rank, called[rank], waits=blocked[rank], **more) for rank in programs}
