"""Who holds a hung run up, told from what its ranks have called. Pure: states of all ranks in, findings out.

By the side channel's facts: a rank that is stopped, silent or gone is the cause whatever it last called. Else the ranks
that wait, each in a collective with a number, are followed to those that have not called it: to one that is elsewhere
(missing), or round in a circle (one has skipped a collective or called one too many). Other calls under one number are a
mismatch. All there and nothing moves: the transport.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    gone = [state for state in states.values() if state.life in ("dead", "stopped", "silent", "unreachable")]
    if gone:
        return tuple(_gone(state, waits, states) for state in sorted(gone, key=lambda state: state.rank))
    if mismatches := _mismatches(states, waits):
        return mismatches
    if late := _late(states, waits):
        return _missing(late, states, waits, patience)
    return _circles(states, waits) or _transport(states, waits, patience)


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

    def order(wait: _Wait) -> tuple[int, float]:
        others = [states[other.rank] for other in waits if other.rank != wait.rank]
        return sum(told.has_passed(other, wait.place) for other in others) if wait.place else 0, wait.seconds

    return max(waits, key=order)


def _gone(state: RankState, waits: Sequence[_Wait], states: Mapping[int, RankState]) -> Finding:
    missed = [wait for wait in waits if wait.place and state.rank in _absent(wait.place, states)]
    missed = missed or [wait for wait in waits if wait.place and state.rank in wait.place.group.ranks]
    first = _first(missed or waits, states)
    return told.missing(state, first.place, first.seconds, sorted({wait.rank for wait in waits}))


def _absent(place: Place, states: Mapping[int, RankState]) -> list[int]:
    """Ranks of the group that have not called this collective; of a message, its other end."""
    if place.call.peer is not None:
        return [place.call.peer] if place.call.peer != NO_PEER else []
    return [rank for rank in place.group.ranks if not _has_entered(states.get(rank), place)]


def _has_entered(state: RankState | None, place: Place) -> bool:
    group = state.group(place.group.name) if state else None
    return group is not None and group.entered is not None and group.entered >= place.call.number


def _mismatches(states: Mapping[int, RankState], waits: Sequence[_Wait]) -> tuple[Finding, ...]:
    """Of each group in which somebody waits, the first number under which ranks called different things."""
    found: dict[str, Finding] = {}
    for wait in waits:
        place = wait.place
        if place is None or place.call.peer is not None or place.group.name in found:
            continue
        for number in sorted(call.number for call in place.group.calls if call.peer is None):
            calls = {
                rank: call
                for rank in place.group.ranks
                if rank in states and (group := states[rank].group(place.group.name)) and (call := group.call(number))
            }
            is_open = not all(call.done for call in calls.values())
            if is_open and len({call.digest for call in calls.values()}) > 1:
                blamed = _blame_for_mismatch({rank: call.digest for rank, call in calls.items()}, states)
                skipped = [
                    rank
                    for rank in blamed
                    for each in own_breaks(states[rank], states)
                    if each.is_skip and (each.group, each.number) == (place.group.name, number)
                ]
                members = [states[rank] for rank in blamed]
                found[place.group.name] = told.mismatch(
                    members, place.group, number, calls, wait.seconds, skipped=skipped
                )
                break
    return tuple(found.values())


def _blame_for_mismatch(digests: Mapping[int, str], states: Mapping[int, RankState]) -> list[int]:
    (common, count), *_ = Counter(digests.values()).most_common(1)
    if 2 * count > len(digests):
        return [rank for rank, digest in digests.items() if digest != common]
    return [rank for rank in digests if own_breaks(states[rank], states)] or list(digests)


def own_breaks(state: RankState, states: Mapping[int, RankState]) -> list[Break]:
    """Where this rank left its habit and most others did not do the same."""
    known = [other for other in states.values() if other.groups]
    most = max(1.0, _SINGULAR_SHARE * (len(known) - 1))
    return [
        each
        for each in state.breaks
        if sum((each.due_digest, each.came) in {(b.due_digest, b.came) for b in other.breaks} for other in known)
        <= most
    ]


def _late(states: Mapping[int, RankState], waits: Sequence[_Wait]) -> dict[int, list[_Wait]]:
    """Ranks that others wait for and that wait for nobody themselves, each with the waits for it."""
    waiters = {wait.rank for wait in waits}
    late: dict[int, list[_Wait]] = {}
    for wait in waits:
        for rank in _absent(wait.place, states) if wait.place else []:
            if rank not in waiters:
                late.setdefault(rank, []).append(wait)
    if not late and any(wait.place is None for wait in waits):  # for a message, from somebody who does not wait
        others = [rank for rank, state in states.items() if rank not in waiters and state.life != "ended"]
        late = {rank: list(waits) for rank in others}
    return late


def _missing(
    late: Mapping[int, Sequence[_Wait]],
    states: Mapping[int, RankState],
    waits: Sequence[_Wait],
    patience: Patience,
) -> tuple[Finding, ...]:
    waiters = sorted({wait.rank for wait in waits})
    first = {rank: _first(missed, states) for rank, missed in sorted(late.items())}
    return tuple(
        told.missing(states[rank], wait.place, wait.seconds, waiters)
        for rank, wait in first.items()
        if max(each.seconds for each in late[rank]) >= patience.of(states[rank])
    )


def _circles(states: Mapping[int, RankState], waits: Sequence[_Wait]) -> tuple[Finding, ...]:
    """Ranks that wait for one another in different collectives: the one out of step is named."""
    edges: dict[int | tuple[str, int], set[int | tuple[str, int]]] = {}
    for wait in waits:
        if wait.place is None:
            continue
        if absent := _absent(wait.place, states):
            node = (wait.place.group.name, wait.place.call.number)
            edges.setdefault(wait.rank, set()).add(node)
            edges[node] = set(absent)
    found = []
    for members in roots(edges):
        ranks = sorted(member for member in members if isinstance(member, int))
        for rank in _blame_for_circle(ranks, states, waits):
            found.append(_out_of_step(states[rank], states, waits))
    return tuple(found)


def _blame_for_circle(ranks: Sequence[int], states: Mapping[int, RankState], waits: Sequence[_Wait]) -> Sequence[int]:
    broken = [rank for rank in ranks if own_breaks(states[rank], states)]
    if broken:
        return broken
    counts = Counter({rank: len(_who_waits_for(rank, states, waits)) for rank in ranks})
    most = max(counts.values())
    return [rank for rank in ranks if counts[rank] == most]


def _who_waits_for(rank: int, states: Mapping[int, RankState], waits: Sequence[_Wait]) -> dict[int, _Wait]:
    return {wait.rank: wait for wait in waits if wait.place and rank in _absent(wait.place, states)}


def _out_of_step(state: RankState, states: Mapping[int, RankState], waits: Sequence[_Wait]) -> Finding:
    missed = _who_waits_for(state.rank, states, waits)
    breaks = own_breaks(state, states)
    skipped = {(each.group, each.number) for each in breaks}
    at_break = [
        wait for wait in missed.values() if wait.place and (wait.place.group.name, wait.place.call.number) in skipped
    ]
    first = _first(at_break or list(missed.values()), states)
    own = next((wait.place for wait in waits if wait.rank == state.rank and wait.place), None)
    assert first.place is not None
    return told.out_of_step(state, first.place, own, first.seconds, sorted(missed), is_known=bool(breaks))


def _transport(states: Mapping[int, RankState], waits: Sequence[_Wait], patience: Patience) -> tuple[Finding, ...]:
    """All have come, and it does not end."""
    limit = max(_TRANSPORT_FACTOR * patience.hang_seconds, _USUAL_MARGIN * patience.usual_wait_s)
    stuck = [wait for wait in waits if wait.seconds >= limit and not (wait.place and _absent(wait.place, states))]
    if not stuck:
        return ()
    first = max(stuck, key=lambda wait: wait.seconds)
    if first.place is None and len({wait.rank for wait in stuck}) < len(states):
        return ()
    name = first.place.group.name if first.place else None
    same = [wait.rank for wait in stuck if (wait.place.group.name if wait.place else None) == name]
    return (told.transport([states[rank] for rank in sorted(set(same))], first.place, first.seconds),)
