"""Slow compute among very many endpoints: all are timed once, then again those that were slow in every pass so far."""

from __future__ import annotations

import math

import numpy as np

from cluster.fabric.analysis.judgement import Slow
from cluster.fabric.probing import Figures
from cluster.fabric.stages.session import Session
from cluster.fabric.statistics import contrast, robust_spread, student_quantile
from cluster.fabric.wide.layout import Indices

_EARLIEST = 3
"""Statistics: passes from which on an end may be convicted, if its tail is small enough by then."""
LEAST_PASSES, _MOST_PASSES = 4, 6
MOST_ROUNDS = 12
_CONTROLS = 200
"""Budget: rounds of compute, rounds of a whole diagnosis, and endpoints that are timed beside suspects."""
_SUSPECT, _CERTAIN = 0.7, 1.5
"""Effect of interest: times the smallest loss of interest: slow in one pass; named after all, where noise is so low."""
_DOF = 100
_PRIOR_DOF = 3
"""Statistics: of the spread of the controls, about half of which tell something new; and as how many passes it counts."""
_IN_A_ROW = 0.01
"""Statistics: endpoints of which accidents alone may have spoilt all passes but one, where it ends early."""
_ACCIDENT = 5.0
"""Statistics: times the noise beyond which a pass was disturbed."""
_LARGEST_TAIL = 1e-3
"""Statistics: of a loss by chance, by its own spread too: a few accidents in a row vary more than slow compute does."""


def slow_computing(session: Session) -> list[Slow]:
    """Four rounds, or up to six where the diagnosis has had few so far; fewer where all are cleared or convicted before.

    What disturbs compute makes it longer, never shorter: one quick pass clears an endpoint.
    """
    session.during = "compute"
    least = math.log1p(session.settings.least_compute_loss)
    controls = np.sort(session.rng.permutation(session.count)[:_CONTROLS])
    passes = min(max(MOST_ROUNDS - session.rounds, LEAST_PASSES), _MOST_PASSES)
    logs = np.full((passes, session.count), np.nan)
    found: list[Slow] = []
    suspects = asked = np.arange(session.count)
    for number in range(passes):
        seconds = np.log(session.compute(asked.tolist(), work_s=session.settings.work_s))
        reference = float(np.median(seconds[np.isin(asked, controls)]))
        logs[number, asked] = seconds - reference
        if number == 0:
            session.compute_s = np.exp(seconds)
        suspects = suspects[logs[number, suspects] > _SUSPECT * least]
        if not len(suspects):
            return []
        asked = np.union1d(suspects, controls)
        if number + 1 < _EARLIEST:
            continue
        found, hopeful = _judged(session, logs[: number + 1], suspects, controls, passes, math.exp(reference))
        in_a_row = session.count * (number + 1) * _accidents(logs[: number + 1, controls]) ** number
        if not hopeful or (len(found) == len(hopeful) and in_a_row < _IN_A_ROW):
            break
    return found


def _judged(
    session: Session, logs: Figures, suspects: Indices, controls: Indices, passes: int, control_s: float
) -> tuple[list[Slow], list[int]]:
    """Who is slow by the passes so far; and who may be so by all `passes`, since more of them only lower the quicker half."""
    noise, spread = _noise(logs[:, np.setdiff1d(controls, suspects)])
    least = math.log1p(session.settings.least_compute_loss)
    tail = session.settings.false_alarm_rate / session.count
    bound = max(_CERTAIN * least, student_quantile(tail, _DOF) * spread)
    lasting = [int(end) for end in suspects if logs[:, end].min() >= 0.45 * bound]
    hopeful = [end for end in lasting if _level(logs[:, end], noise, passes // 2) >= bound]
    found = [_slow(end, logs[:, end], noise, control_s) for end in lasting if _level(logs[:, end], noise) >= bound]
    return [item for item in found if item.tail < _LARGEST_TAIL], hopeful


def _accidents(logs: Figures) -> float:
    """Probability that a pass is disturbed, by the controls', (passes, controls); one more than was seen."""
    away = logs - np.median(logs, axis=0)
    return float((1 + (away > _ACCIDENT * robust_spread(away)).sum()) / away.size)


def _noise(logs: Figures) -> tuple[float, float]:
    """Of one pass, and of an endpoint's mean over all passes, which healthy endpoints differ in for good as well."""
    return robust_spread(logs - np.median(logs, axis=0)), robust_spread(np.median(logs, axis=0))


def _level(logs: Figures, noise: float, quickest: int | None = None) -> float:
    """By the quicker half of the passes, less by how much chance alone makes those quicker (0.66 of 4 normal ones)."""
    return float(np.sort(logs)[: quickest or len(logs) // 2].mean() + 0.66 * noise)


def _slow(end: int, logs: Figures, noise: float, control_s: float) -> Slow:
    # Without the slowest pass: one accident says nothing against it.
    loss = contrast(np.sort(logs)[:-1], known_spread=noise, known_dof=_PRIOR_DOF)
    evidence = {
        "compute_s": control_s * math.exp(loss.mean),
        "control_compute_s": control_s,
        "comparisons": loss.count,
    }
    return Slow(part=None, endpoint=end, log_loss=loss.mean, tail=loss.tail_beyond(0.0), evidence=evidence)
