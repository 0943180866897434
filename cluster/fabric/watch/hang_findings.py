"""The words of a hang: findings with their evidence, one sentence each. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.fabric.findings import Finding
from cluster.fabric.watch.state import Call, GroupCalls, RankState

_STATES = {
    "starting": "has not reported yet",
    "stopped": "is stopped (by SIGSTOP or a debugger)",
    "silent": "lives, but none of its Python threads runs: native code holds the interpreter, or the host gives it no time",
    "unreachable": "is out of reach: its host answers no more",
    "dead": "is gone: its process ended without a word",
    "ended": "has ended in good order",
}
_ACTIVITIES = {
    "idle": "does nothing",
    "working": "is busy elsewhere",
    "waiting": "waits elsewhere",
}
_SHOWN_RANKS = 8


@dataclass(frozen=True, kw_only=True)
class Place:
    """A call in which a rank waits."""

    group: GroupCalls
    call: Call

    @property
    def text(self) -> str:
        """For a sentence."""
        if self.call.peer is not None:
            return f"a message on {self.group.axis} ({self.call.text})"
        return f"collective {self.call.number} on {self.group.axis} ({self.call.text})"

    def as_data(self) -> dict[str, Any]:
        """For evidence."""
        return {
            "axis": self.group.axis,
            "group": self.group.name,
            "group_ranks": list(self.group.ranks),
            "number": self.call.number,
            "collective": self.call.text,
        }


def missing(state: RankState, place: Place | None, waited_s: float, waiting: Sequence[int]) -> Finding:
    """A rank that never came."""
    reason = _STATES.get(state.life) or _ACTIVITIES[state.activity]
    seen = f", last seen at {state.place[0]}" if state.place else ""
    others = [rank for rank in waiting if rank != state.rank]
    where = place.text if place else "messages from others"
    return Finding(
        kind="missing_rank",
        hosts=(state.host,),
        ranks=(state.rank,),
        confidence=_confidence(state),
        evidence={
            **(place.as_data() if place else {}),
            "state": state.life if state.life != "running" else state.activity,
            "waited_s": round(waited_s, 1),
            "waiting_ranks": others,
            "place": list(state.place),
        },
        sentence=(
            f"{_name(state)} {reason}{seen}: {ranks_text(others)} waited {waited_s:.0f} s for it in {where}."
            if others
            else f"{_name(state)} {reason}{seen}."
        ),
    )


def died(state: RankState, others: Mapping[int, RankState]) -> Finding:
    """A rank whose process is gone, told before anybody has waited for it; `others` say what they called last."""
    last = {rank: place for rank, other in others.items() if (place := _last_place(other))}
    held = [rank for rank, place in last.items() if state.rank in place.group.ranks]

    ahead = Ahead([others[rank] for rank in held])
    first = max(held, key=lambda rank: (ahead.of(others[rank], last[rank]), last[rank].call.age_s), default=None)
    place = None if first is None else last[first]
    seen = f", last seen at {state.place[0]}" if state.place else ""
    pending = f"; the others were in {place.text}" if place else ""
    return Finding(
        kind="missing_rank",
        hosts=(state.host,),
        ranks=(state.rank,),
        confidence=_confidence(state),
        evidence={**(place.as_data() if place else {}), "state": state.life, "place": list(state.place)},
        sentence=f"{_name(state)} {_STATES[state.life]}{seen}{pending}.",
    )


class Ahead:
    """How many of some ranks have, each in its own group of an axis, already done what others are in: it was due before.

    A rank counts as often as it is in `states`. Looks at each rank once per place, however often it is asked.
    """

    def __init__(self, states: Sequence[RankState]) -> None:
        self._states = states
        self._times = Counter(state.rank for state in states)
        self._known: dict[tuple[str, int], int] = {}

    def of(self, state: RankState, place: Place) -> int:
        """Of `place`, in which `state` is: apart from itself."""
        key = (place.group.axis, place.call.number)
        if key not in self._known:
            self._known[key] = sum(_has_passed(each, place) for each in self._states)
        return self._known[key] - self._times[state.rank] * _has_passed(state, place)


def _has_passed(state: RankState, place: Place) -> bool:
    return state.last_done(place.group.axis) >= place.call.number


def _last_place(state: RankState) -> Place | None:
    """The call that a rank is in, or was in when it failed."""
    places = [Place(group=group, call=call) for group in state.groups for call in group.calls if call.peer is None]
    return min(places, key=lambda place: place.call.age_s, default=None)


def out_of_step(
    state: RankState, missed: Place, own: Place | None, waited_s: float, waiting: Sequence[int], *, is_known: bool
) -> Finding:
    """A rank that waits in one collective while others wait for it in another. `is_known`: it has left its own habit."""
    elsewhere = own.text if own else "messages"
    return Finding(
        kind="missing_rank",
        hosts=(state.host,),
        ranks=(state.rank,),
        confidence=0.97 if is_known else 0.75,
        evidence={
            **missed.as_data(),
            "state": "out of step",
            "waited_s": round(waited_s, 1),
            "waiting_ranks": list(waiting),
            "instead": own.as_data() if own else {},
            "place": list(state.place),
        },
        sentence=(
            f"{_name(state)} is out of step: {ranks_text(waiting)} waited {waited_s:.0f} s for it in {missed.text}, which it "
            f"{'skipped' if is_known else 'did not call'}, while it waits in {elsewhere}."
        ),
    )


def mismatch(
    blamed: Sequence[RankState],
    group: GroupCalls,
    number: int,
    calls: Mapping[int, Call],
    waited_s: float,
    *,
    skipped: Sequence[int],
) -> Finding:
    """Ranks that called something else under the same number; those in `skipped` called what was due after it."""
    by_text: dict[str, list[int]] = {}
    for rank, call in calls.items():
        by_text.setdefault(call.text, []).append(rank)
    named = {state.rank for state in blamed}
    is_clear = len(named) < len(calls)
    called = "; ".join(f"{ranks_text(ranks)} called {text}" for text, ranks in by_text.items())
    who = " and ".join(_name(state) for state in blamed)
    verb = "differs in" if len(blamed) == 1 else "differ in"
    if skipped and set(skipped) == named:
        verb = "skipped"
    return Finding(
        kind="mismatched_collective",
        hosts=tuple(dict.fromkeys(state.host for state in blamed)),
        ranks=tuple(state.rank for state in blamed),
        confidence=0.97 if is_clear else 0.5,
        evidence={
            "axis": group.axis,
            "group": group.name,
            "group_ranks": list(group.ranks),
            "number": number,
            "calls": {str(rank): call.text for rank, call in calls.items()},
            "skipped": list(skipped),
            "waited_s": round(waited_s, 1),
            "place": [line for state in blamed for line in state.place[:1]],
        },
        sentence=f"{who} {verb} collective {number} on {group.axis}: {called}.",
    )


def transport(states: Sequence[RankState], place: Place | None, waited_s: float) -> Finding:
    """All ranks are there, and nothing moves."""
    ranks = [state.rank for state in states]
    where = place.text if place else "messages between ranks"
    come = "all ranks of it have called it" if place else "every rank waits for one"
    return Finding(
        kind="transport_fault",
        hosts=tuple(dict.fromkeys(state.host for state in states)),
        ranks=tuple(ranks),
        confidence=0.8 if place else 0.5,
        evidence={
            **(place.as_data() if place else {}),
            "waited_s": round(waited_s, 1),
            "waiting_ranks": ranks,
        },
        sentence=f"{where[0].upper()}{where[1:]} has not ended for {waited_s:.0f} s on {ranks_text(ranks)}, though {come}.",
    )


def ranks_text(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 0, 1 and 2", "ranks 0, 1, 2 and 61 more"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > _SHOWN_RANKS:
        shown = ", ".join(map(str, ranks[: _SHOWN_RANKS - 1]))
        return f"ranks {shown} and {len(ranks) - _SHOWN_RANKS + 1} more"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _name(state: RankState) -> str:
    return f"rank {state.rank} ({state.host})"


def _confidence(state: RankState) -> float:
    if state.life in ("dead", "stopped"):
        return 0.99
    if state.life in ("silent", "unreachable", "ended"):
        return 0.95
    return 0.9 if state.activity == "idle" else 0.7
