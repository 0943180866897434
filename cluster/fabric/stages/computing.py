"""Which endpoints compute slowly: all are timed a few times, then those that look slow again, beside some that do not."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from cluster.fabric.probing import Figures
from cluster.fabric.stages.session import Session
from cluster.fabric.statistics import Contrast, contrast, noise_from_repeats, robust_spread, student_tail

_PASSES = 2
_CONTROLS = 3
_LEAST_REPEATS, _MOST_REPEATS = 4, 12
"""Budget: of time; endpoints that share a machine take turns."""
_LASTING = 1.15
"""Effect of interest: times the smallest loss of interest that is named: endpoints that are well differ a little for good."""
_FULL_MACHINE = 8
"""Budget: with more endpoints than this on one machine each gets a shorter piece of work."""
_LEAST_NOISE = 0.005
"""Physics: no clock and scheduler repeat a time better than this, whatever a few repeats say."""


@dataclass(frozen=True, kw_only=True)
class SlowCompute:
    """An endpoint whose compute is slow, by fresh measurements."""

    endpoint: int
    loss: Contrast
    """Of the logarithm of its time over that of the controls beside it."""
    tail: float
    """Probability of such a measurement if it were not slow."""
    seconds: float
    control_s: float
    """Medians."""


def slow_computing(session: Session, *, most_endpoints: int | None = None) -> list[SlowCompute]:
    """Screens all endpoints, then confirms each suspicion by comparisons of its own."""
    session.during = "compute"
    everyone = list(range(session.count))
    machines = Counter(endpoint.machine for endpoint in session.endpoints)
    work_s = session.settings.work_s * min(1.0, _FULL_MACHINE / max(machines.values()))
    logs = np.stack([np.log(session.compute(everyone, work_s=work_s)) for _ in range(_PASSES)])
    # What disturbs compute makes it longer, never shorter: the fastest repeat is the best one.
    levels = logs.min(axis=0)
    session.compute_s = np.exp(levels)
    if session.count < 2:
        return []
    noise = max(_relative_noise(logs), _LEAST_NOISE)
    least = math.log1p(session.settings.least_compute_loss)
    above = levels - np.median(levels)
    suspects = [int(index) for index in np.flatnonzero(above > max(0.5 * least, 1.2 * noise / math.sqrt(_PASSES)))]
    suspects = sorted(suspects, key=lambda index: -above[index])[: max(session.count // 2, 1)]
    if not suspects:
        return []
    return _confirmed(session, suspects, above, noise, 1.5 * work_s)


def _relative_noise(logs: Figures) -> float:
    """Of one time, (passes, n), about its endpoint's median, without what all endpoints of a pass share."""
    level = logs - np.median(logs, axis=1, keepdims=True)
    return noise_from_repeats(level.ravel(), np.tile(np.arange(logs.shape[1]), logs.shape[0]))


def _confirmed(session: Session, suspects: list[int], above: Figures, noise: float, work_s: float) -> list[SlowCompute]:
    settings = session.settings
    least = math.log1p(settings.least_compute_loss)
    # What endpoints differ in for good: the spread of their levels without what one measurement's noise adds to it.
    lasting = math.sqrt(max(robust_spread(above) ** 2 - 0.5 * noise**2, 0.0))
    bound = max(_LASTING * least, 3.0 * lasting)
    healthy = [int(index) for index in np.argsort(above) if int(index) not in suspects]
    # Not the fastest, which are fast by chance: those around the middle.
    middle = max(0, len(healthy) - _CONTROLS - 1)
    controls = healthy[middle : middle + _CONTROLS] or healthy
    times: dict[int, list[float]] = {index: [] for index in [*suspects, *controls]}
    open_cases = list(suspects)
    found: list[SlowCompute] = []
    for repeat in range(_MOST_REPEATS):
        who = [int(index) for index in session.rng.permutation([*open_cases, *controls])]
        for index, seconds in zip(who, session.compute(who, work_s=work_s)):
            times[index].append(float(seconds))
        if repeat + 1 < _LEAST_REPEATS:
            continue
        last = repeat + 1 == _MOST_REPEATS or not session.in_time()
        reference = np.median(np.log([times[index] for index in controls]), axis=0)
        for index in list(open_cases):
            loss = contrast(np.log(times[index]) - reference, known_spread=1.2 * noise, known_dof=4)
            tail = loss.tail_beyond(0.6 * least)
            if loss.mean >= bound and tail < settings.false_alarm_rate / session.count:
                control_s = float(np.median([times[control] for control in controls]))
                slow = SlowCompute(
                    endpoint=index, loss=loss, tail=tail, seconds=float(np.median(times[index])), control_s=control_s
                )
                found.append(slow)
                open_cases.remove(index)
            elif student_tail((least - loss.mean) / loss.standard_error, loss.dof) < 0.02:
                open_cases.remove(index)
        if not open_cases or last:
            break
    return found
