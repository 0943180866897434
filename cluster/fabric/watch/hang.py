"""Who holds a hung run up, told from what its ranks have called. Pure: states of all ranks in, findings out.

By the side channel's facts: a rank that is stopped, silent or gone is the cause whatever it last called. Else the ranks
that wait, each in a collective with a number, are followed to those that have not called it: to one that is elsewhere
(missing), or round in a circle (one has skipped a collective or called one too many). Other calls under one number are a
mismatch. All there and nothing moves: the transport.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from cluster.fabric.findings import Finding
from cluster.fabric.watch import hang_findings as told
from cluster.fabric.watch.hang_findings import Place
from cluster.fabric.watch.state import NO_PEER, Break, RankState
from cluster.fabric.watch.waits_for import roots

_WORKING_FACTOR = 8.0
"""A rank that works may take so much longer than one that does nothing: a validation, a checkpoint, a compiler."""
_ALMOST_SHARE = 0.75
"""Of `hang_seconds`: a rank tells once a second since when it waits."""
_TRANSPORT_FACTOR = 4.0
"""A transfer may rightly take long, and nothing tells one that crawls from one that stands."""
_USUAL_MARGIN = 1.5
_SINGULAR_SHARE = 0.5
"""A break of habit that so many ranks share is the program's own doing."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a wait may last."""

    hang_seconds: float
    usual_wait_s: float = 0.0
    """The longest wait that has ended well: what was late once may be late again."""

    def of(self, late: RankState) -> float:
        """For a rank that others wait for while it lives."""
        usual = _USUAL_MARGIN * self.usual_wait_s
        if late.life == "ended":
            return self.hang_seconds
        factor = 1.0 if late.life == "running" and late.activity == "idle" else _WORKING_FACTOR
        return max(factor * self.hang_seconds, usual)


@dataclass(frozen=True, kw_only=True)
class _Wait:
    """One rank in one call that does not end."""

    rank: int
    place: Place | None
    """None: it waits for messages, of which the recorder knows nothing."""
    seconds: float


class _Scene:
    """The ranks and their waits, with what is asked of them again and again: thousands of ranks may wait for one."""

    def __init__(self, states: Mapping[int, RankState], waits: Sequence[_Wait]) -> None:
        self.states = states
        self.waits = waits
        self._absent: dict[tuple[str, int, int | None], tuple[int, ...]] = {}

    def absent(self, place: Place) -> tuple[int, ...]:
        """Ranks of the group that have not called this collective; of a message, its other end."""
        node = _node(place)
        if node not in self._absent:
            self._absent[node] = self._find_absent(place)
        return self._absent[node]

    def who_waits_for(self, rank: int) -> Mapping[int, _Wait]:
        """Ranks that wait for this one, each with a wait."""
        return self._waiters.get(rank, {})

    def own_breaks(self, state: RankState) -> list[Break]:
        """Where this rank left its habit and most others did not do the same."""
        known = sum(bool(other.groups) for other in self.states.values())
        most = max(1.0, _SINGULAR_SHARE * (known - 1))
        return [each for each in state.breaks if self._shared[each.due_digest, each.came] <= most]

    def _find_absent(self, place: Place) -> tuple[int, ...]:
        if place.call.peer is not None:
            return (place.call.peer,) if place.call.peer != NO_PEER else ()
        return tuple(rank for rank in place.group.ranks if not _has_entered(self.states.get(rank), place))

    @cached_property
    def _waiters(self) -> dict[int, dict[int, _Wait]]:
        waiters: dict[int, dict[int, _Wait]] = {}
        for wait in self.waits:
            for rank in self.absent(wait.place) if wait.place else ():
                waiters.setdefault(rank, {})[wait.rank] = wait
        return waiters

    @cached_property
    def _shared(self) -> Counter[tuple[str, str]]:
        """How many ranks left their habits in the same way."""
        known = [state for state in self.states.values() if state.groups]
        return Counter(pair for state in known for pair in {(each.due_digest, each.came) for each in state.breaks})


def _node(place: Place) -> tuple[str, int, int | None]:
    """A call, the same for all ranks that wait in it."""
    return place.group.name, place.call.number, place.call.peer


def waiting_ranks(states: Mapping[int, RankState], seconds: float) -> tuple[int, ...]:
    """Ranks that have waited for others for so long."""
    return tuple(sorted({wait.rank for wait in _waits(states, seconds)}))


def find_hangs(states: Mapping[int, RankState], patience: Patience) -> tuple[Finding, ...]:
    """What holds the run up, if anything does. `states` has every rank of the run.

    Deaths are not told here, unless somebody waits: a run that was ended leaves dead ranks, too.
    """
    if not _waits(states, patience.hang_seconds):
        return ()
    # Those who began to wait a little later show where the run first stood still.
    waits = _waits(states, _ALMOST_SHARE * patience.hang_seconds)
    scene = _Scene(states, waits)
    gone = [state for state in states.values() if state.life in ("dead", "stopped", "silent", "unreachable")]
    if gone:
        return tuple(_gone(state, scene) for state in sorted(gone, key=lambda state: state.rank))
    if mismatches := _mismatches(scene):
        return mismatches
    if late := _late(scene):
        return _missing(late, scene, patience)
    return _circles(scene) or _transport(scene, patience)


def _waits(states: Mapping[int, RankState], seconds: float) -> list[_Wait]:
    found = []
    for state in states.values():
        if state.life != "running" or state.quiet_s < seconds:
            continue
        pending = [
            _Wait(rank=state.rank, place=Place(group=group, call=call), seconds=min(call.age_s, state.quiet_s))
            for group in state.groups
            for call in group.calls
            if not call.done and call.age_s >= seconds
        ]
        if not pending and state.activity == "waiting":
            pending = [_Wait(rank=state.rank, place=None, seconds=state.quiet_s)]
        found += pending
    return found


def _first(waits: Sequence[_Wait], states: Mapping[int, RankState]) -> _Wait:
    """The wait that came first in the order of the program; among those that this cannot tell, the longest."""
    ahead = told.Ahead([states[wait.rank] for wait in waits])
    return max(waits, key=lambda wait: (ahead.of(states[wait.rank], wait.place) if wait.place else 0, wait.seconds))


def _gone(state: RankState, scene: _Scene) -> Finding:
    missed = list(scene.who_waits_for(state.rank).values())
    missed = missed or [wait for wait in scene.waits if wait.place and state.rank in wait.place.group.ranks]
    first = _first(missed or scene.waits, scene.states)
    return told.missing(state, first.place, first.seconds, sorted({wait.rank for wait in scene.waits}))


def _has_entered(state: RankState | None, place: Place) -> bool:
    group = state.group(place.group.name) if state else None
    return group is not None and group.entered is not None and group.entered >= place.call.number


def _mismatches(scene: _Scene) -> tuple[Finding, ...]:
    """Of each group in which somebody waits, the first number under which ranks called different things."""
    waits: dict[str, _Wait] = {}
    numbers: dict[str, set[int]] = {}
    for wait in scene.waits:
        if wait.place is not None and wait.place.call.peer is None:
            group = wait.place.group
            waits.setdefault(group.name, wait)
            numbers.setdefault(group.name, set()).update(call.number for call in group.calls if call.peer is None)
    found = (_mismatch(wait, sorted(numbers[name]), scene) for name, wait in waits.items())
    return tuple(finding for finding in found if finding is not None)


def _mismatch(wait: _Wait, numbers: Sequence[int], scene: _Scene) -> Finding | None:
    assert wait.place is not None
    group = wait.place.group
    views = {
        rank: view for rank in group.ranks if (state := scene.states.get(rank)) and (view := state.group(group.name))
    }
    for number in numbers:
        calls = {rank: call for rank, view in views.items() if (call := view.call(number))}
        is_open = not all(call.done for call in calls.values())
        if is_open and len({call.digest for call in calls.values()}) > 1:
            blamed = _blame_for_mismatch({rank: call.digest for rank, call in calls.items()}, scene)
            skipped = [
                rank
                for rank in blamed
                for each in scene.own_breaks(scene.states[rank])
                if each.is_skip and (each.group, each.number) == (group.name, number)
            ]
            members = [scene.states[rank] for rank in blamed]
            return told.mismatch(members, group, number, calls, wait.seconds, skipped=skipped)
    return None


def _blame_for_mismatch(digests: Mapping[int, str], scene: _Scene) -> list[int]:
    (common, count), *_ = Counter(digests.values()).most_common(1)
    if 2 * count > len(digests):
        return [rank for rank, digest in digests.items() if digest != common]
    return [rank for rank in digests if scene.own_breaks(scene.states[rank])] or list(digests)


def own_breaks(state: RankState, states: Mapping[int, RankState]) -> list[Break]:
    """Where this rank left its habit and most others did not do the same."""
    return _Scene(states, ()).own_breaks(state)


def _late(scene: _Scene) -> dict[int, list[_Wait]]:
    """Ranks that others wait for and that wait for nobody themselves, each with the waits for it."""
    waiters = {wait.rank for wait in scene.waits}
    late: dict[int, list[_Wait]] = {}
    for wait in scene.waits:
        for rank in scene.absent(wait.place) if wait.place else ():
            if rank not in waiters:
                late.setdefault(rank, []).append(wait)
    if not late and any(wait.place is None for wait in scene.waits):  # a message, from somebody who does not wait
        others = [rank for rank, state in scene.states.items() if rank not in waiters and state.life != "ended"]
        late = {rank: list(scene.waits) for rank in others}
    return late


def _missing(late: Mapping[int, Sequence[_Wait]], scene: _Scene, patience: Patience) -> tuple[Finding, ...]:
    waiters = sorted({wait.rank for wait in scene.waits})
    due = {
        rank: missed
        for rank, missed in sorted(late.items())
        if min(max(wait.seconds for wait in missed), _seconds_of_chance(scene.states[rank]))
        >= patience.of(scene.states[rank])
    }
    firsts = {rank: _first(missed, scene.states) for rank, missed in due.items()}
    return tuple(told.missing(scene.states[rank], wait.place, wait.seconds, waiters) for rank, wait in firsts.items())


def _seconds_of_chance(state: RankState) -> float:
    """How long it could have come: what was stopped goes on a moment ago."""
    return state.life_s if state.life == "running" else math.inf


def _circles(scene: _Scene) -> tuple[Finding, ...]:
    """Ranks that wait for one another in different collectives: the one out of step is named."""
    edges: dict[int | tuple[str, int, int | None], set[int | tuple[str, int, int | None]]] = {}
    for wait in scene.waits:
        if wait.place is None:
            continue
        if absent := scene.absent(wait.place):
            node = _node(wait.place)
            edges.setdefault(wait.rank, set()).add(node)
            if node not in edges:
                edges[node] = set(absent)
    found = []
    for members in roots(edges):
        ranks = sorted(member for member in members if isinstance(member, int))
        for rank in _blame_for_circle(ranks, scene):
            found.append(_out_of_step(scene.states[rank], scene))
    return tuple(found)


def _blame_for_circle(ranks: Sequence[int], scene: _Scene) -> Sequence[int]:
    broken = [rank for rank in ranks if scene.own_breaks(scene.states[rank])]
    if broken:
        return broken
    counts = {rank: len(scene.who_waits_for(rank)) for rank in ranks}
    most = max(counts.values())
    return [rank for rank in ranks if counts[rank] == most]


def _out_of_step(state: RankState, scene: _Scene) -> Finding:
    missed = scene.who_waits_for(state.rank)
    breaks = scene.own_breaks(state)
    skipped = {(each.group, each.number) for each in breaks}
    at_break = [
        wait for wait in missed.values() if wait.place and (wait.place.group.name, wait.place.call.number) in skipped
    ]
    first = _first(at_break or list(missed.values()), scene.states)
    own = next((wait.place for wait in scene.waits if wait.rank == state.rank and wait.place), None)
    assert first.place is not None
    return told.out_of_step(state, first.place, own, first.seconds, sorted(missed), is_known=bool(breaks))


def _transport(scene: _Scene, patience: Patience) -> tuple[Finding, ...]:
    """All have come, and it does not end."""
    limit = max(_TRANSPORT_FACTOR * patience.hang_seconds, _USUAL_MARGIN * patience.usual_wait_s)
    stuck = [wait for wait in scene.waits if wait.seconds >= limit and not (wait.place and scene.absent(wait.place))]
    if not stuck:
        return ()
    first = max(stuck, key=lambda wait: wait.seconds)
    if first.place is None and len({wait.rank for wait in stuck}) < len(scene.states):
        return ()
    name = first.place.group.name if first.place else None
    same = [wait.rank for wait in stuck if (wait.place.group.name if wait.place else None) == name]
    members = [scene.states[rank] for rank in sorted(set(same))]
    return (told.transport(members, first.place, first.seconds),)
