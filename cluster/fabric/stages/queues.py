"""Round trips while the own flows rest: a standing queue is foreign traffic's. Evidence, not a test of its own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from cluster.fabric.analysis.explain import Part
from cluster.fabric.stages.session import Session
from cluster.fabric.statistics import contrast

_REPEATS = 4
"""Budget: as many as a mean and its spread need. Each takes other pairs, so that no single pair's path decides."""
_INFLATED = 0.7
"""Effect of interest: logarithm of a round trip over others (a factor of two) from which on a queue is said to stand on it.
Distance alone makes a factor of up to 1.5 between the pairs of a fabric of two levels; a queue that costs a tenth of a link is
filled most of the time, and then holds many times the packets that an idle round trip takes."""
_SPREAD, _DOF = 0.2, 3
"""Statistics: standard deviation of a logarithm of a round trip on a busy machine, and how many repeats that counts as."""
_LARGEST_TAIL = 0.01
"""Statistics: probability of such an inflation by chance."""
_UPLINK_SHARE = 4
"""Budget: of so many endpoints one pair crosses an uplink; the others are left for pairs beside it."""


@dataclass(frozen=True, kw_only=True)
class Queue:
    """Round trips through a part that was found slow, beside others at the same time."""

    round_trip_s: float
    control_round_trip_s: float
    """Medians."""
    standing: bool
    """Whether packets wait in it although nobody but strangers sends."""


def standing_queue(session: Session, part: Part, others: list[Part]) -> Queue | None:
    """Round trips that pass `part` against such as pass none of `others` either; None where there are no such pairs."""
    session.during = "round trips"
    through: list[float] = []
    beside: list[float] = []
    most = 1 if part.kind != "uplink" else max(session.count // _UPLINK_SHARE, 1)
    before: set[tuple[int, int]] = set()
    for _ in range(_REPEATS):
        crossing = _pick(session, [part], [], set(), most=most, before=before)
        before |= set(crossing)
        controls = _pick(session, [], [part, *others], {end for pair in crossing for end in pair}, most=2)
        if not crossing or not controls:
            return None
        trips = session.round_trip(np.array([*crossing, *controls]), repeats=5)
        through.append(float(np.median(trips[: len(crossing)])))
        beside.append(float(np.median(trips[len(crossing) :])))
    inflation = contrast(np.log(through) - np.log(beside), known_spread=_SPREAD, known_dof=_DOF)
    return Queue(
        round_trip_s=float(np.median(through)),
        control_round_trip_s=float(np.median(beside)),
        standing=inflation.mean > _INFLATED and inflation.tail_beyond(0.0) < _LARGEST_TAIL,
    )


def _pick(
    session: Session,
    passing: list[Part],
    avoiding: list[Part],
    taken: set[int],
    *,
    most: int,
    before: Collection[tuple[int, int]] = (),
) -> list[tuple[int, int]]:
    """Up to `most` disjoint pairs at random that pass all of `passing` and, neither way, any of `avoiding`.

    before: pairs that are taken only where no others are left.
    """
    count = session.count
    pairs = session.rng.permutation([(a, b) for a in range(count) for b in range(count) if a != b])
    pairs = pairs[np.argsort([(int(a), int(b)) in before for a, b in pairs], kind="stable")]
    chosen: list[tuple[int, int]] = []
    used = set(taken)
    wanted = np.ones(len(pairs), dtype=bool)
    for part in passing:
        wanted &= part.passed_by(pairs)
    for part in avoiding:
        wanted &= ~part.passed_by(pairs) & ~part.passed_by(pairs[:, ::-1])
    for source, sink in pairs[wanted].tolist():
        if source not in used and sink not in used and len(chosen) < most:
            chosen.append((source, sink))
            used |= {source, sink}
    return chosen
