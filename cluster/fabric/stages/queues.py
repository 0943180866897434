"""Round trips while the own flows rest: a standing queue is foreign traffic's. Evidence, not a test of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.fabric.analysis.explain import Part
from cluster.fabric.stages.session import Session
from cluster.fabric.statistics import contrast

_REPEATS = 4
_INFLATED = 0.7
"""Logarithm of a round trip over others (a factor of two) from which on a queue stands somewhere on it."""


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
    for _ in range(_REPEATS):
        crossing = _pick(session, [part], [], set(), most=1 if part.kind != "uplink" else 2)
        controls = _pick(session, [], [part, *others], {end for pair in crossing for end in pair}, most=2)
        if not crossing or not controls:
            return None
        trips = session.round_trip(np.array([*crossing, *controls]), repeats=5)
        through.append(float(np.median(trips[: len(crossing)])))
        beside.append(float(np.median(trips[len(crossing) :])))
    inflation = contrast(np.log(through) - np.log(beside), known_spread=0.2, known_dof=3)
    return Queue(
        round_trip_s=float(np.median(through)),
        control_round_trip_s=float(np.median(beside)),
        standing=inflation.mean > _INFLATED and inflation.tail_beyond(0.0) < 0.01,
    )


def _pick(
    session: Session, passing: list[Part], avoiding: list[Part], taken: set[int], *, most: int
) -> list[tuple[int, int]]:
    """Up to `most` disjoint pairs at random that pass all of `passing` and, neither way, any of `avoiding`."""
    count = session.count
    pairs = session.rng.permutation([(a, b) for a in range(count) for b in range(count) if a != b])
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
