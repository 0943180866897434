"""What the watch knows of a rank: its process, and its calls of collectives group by group. Plain data, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

Life = Literal["starting", "running", "stopped", "silent", "unreachable", "dead", "ended"]
"""starting: it has not reported yet. stopped: by a signal (SIGSTOP, a debugger). silent: the process lives, yet its threads
of Python do not run. unreachable: its host's watcher answers no more. dead: gone without a word. ended: left in good order."""
Activity = Literal["waiting", "working", "idle"]
"""waiting: it stands in a call of the communication library. working: it uses a processor or a disk, or its code moves on.
idle: neither."""
NO_PEER = -1
"""The peer of messages that the recorder holds as one, with ranks it does not tell."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One collective as one rank called it."""

    number: int
    """Its place among the group's collectives, from 1: the same on all ranks of a group that call the same ones."""
    text: str
    """For people: "all_reduce of 1000 float32"."""
    digest: str
    """Equal on two ranks exactly where their calls fit together."""
    done: bool
    age_s: float
    """Since the call."""
    peer: int | None = None
    """World rank at the other end of a message, or `NO_PEER`; None for a collective."""


@dataclass(frozen=True, kw_only=True)
class GroupCalls:
    """One rank's latest calls on one of its groups."""

    name: str
    """Unique in the run, and the same on all ranks of the group."""
    axis: str
    ranks: tuple[int, ...]
    """World ranks of the group, in its order."""
    calls: tuple[Call, ...]
    """In the order of numbers, collectives and messages apart; the last ones only."""

    @cached_property
    def entered(self) -> int | None:
        """Number of the last collective that this rank has called; None where none is remembered."""
        return max(self._collectives, default=None)

    def call(self, number: int) -> Call | None:
        """The collective of that number, where it is remembered."""
        return self._collectives.get(number)

    @cached_property
    def _collectives(self) -> dict[int, Call]:
        return {call.number: call for call in self.calls if call.peer is None}


@dataclass(frozen=True, kw_only=True)
class Break:
    """Where a rank left its own habit: after the same calls as before, it has always called something else."""

    group: str
    """Name of the group whose collective was due."""
    number: int
    """The number that it would have had."""
    due: str
    """What was due, by `Call.text`."""
    due_digest: str
    came: str
    """What came instead, by `Call.text`, with the axis where that is another."""
    is_skip: bool
    """What came is what used to come after the one that was due."""
    calls_ago: int
    """0: it is the last call."""


@dataclass(frozen=True, kw_only=True)
class RankState:
    """One rank at one moment."""

    rank: int
    host: str
    life: Life
    life_s: float
    """For how long it has been so."""
    quiet_s: float = 0.0
    """Since one of its collectives began or ended."""
    activity: Activity = "working"
    place: tuple[str, ...] = ()
    """Where its main thread is, the innermost function first; as of its last word."""
    groups: tuple[GroupCalls, ...] = ()
    breaks: tuple[Break, ...] = ()

    def group(self, name: str) -> GroupCalls | None:
        """Its view of a group that it belongs to, where it has told of it."""
        return self._by_name.get(name)

    def last_done(self, axis: str) -> int:
        """The highest number of a call that is done, in its own group along an axis; 0 where there is none."""
        return self._last_done.get(axis, 0)

    @cached_property
    def _by_name(self) -> dict[str, GroupCalls]:
        return {group.name: group for group in self.groups}

    @cached_property
    def _last_done(self) -> dict[str, int]:
        last: dict[str, int] = {}
        for group in self.groups:
            numbers = [call.number for call in group.calls if call.done]
            last[group.axis] = max(last.get(group.axis, 0), *numbers, 0)
        return last


def pack_ranks(ranks: Sequence[int]) -> list[int]:
    """Ranks as runs `first, count, stride, ...`: a world of thousands takes three numbers."""
    packed: list[int] = []
    start = 0
    while start < len(ranks):
        stride = ranks[start + 1] - ranks[start] if start + 1 < len(ranks) else 1
        stop = start + 1
        while stop < len(ranks) and ranks[stop] - ranks[stop - 1] == stride:
            stop += 1
        packed += [ranks[start], stop - start, stride]
        start = stop
    return packed


def unpack_ranks(packed: Sequence[int]) -> tuple[int, ...]:
    """What `pack_ranks` made."""
    runs = zip(packed[::3], packed[1::3], packed[2::3], strict=True)
    return tuple(first + stride * index for first, count, stride in runs for index in range(count))


def pack_groups(groups: Sequence[GroupCalls]) -> list[dict[str, Any]]:
    """For JSON, short."""
    return [
        {
            "name": group.name,
            "axis": group.axis,
            "ranks": pack_ranks(group.ranks),
            "calls": [
                [call.number, call.text, call.digest, int(call.done), round(call.age_s, 3), call.peer]
                for call in group.calls
            ],
        }
        for group in groups
    ]


def unpack_groups(data: Sequence[Mapping[str, Any]], later_s: float = 0.0) -> tuple[GroupCalls, ...]:
    """What `pack_groups` made, `later_s` seconds later."""
    return tuple(
        GroupCalls(
            name=group["name"],
            axis=group["axis"],
            ranks=unpack_ranks(group["ranks"]),
            calls=tuple(
                Call(number=number, text=text, digest=digest, done=bool(done), age_s=age_s + later_s, peer=peer)
                for number, text, digest, done, age_s, peer in group["calls"]
            ),
        )
        for group in data
    )
