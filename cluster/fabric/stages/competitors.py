"""Which flows compete for a congested uplink: the own ones, or strangers."""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster.fabric.stages.confirm import Confirmed
from cluster.fabric.stages.session import Session

_REPEATS = 3
_SHARES = 0.08
"""Least gain of the other flows, as a logarithm, that counts as sharing when one is left out."""


def competitors(session: Session, item: Confirmed, *, standing: bool) -> dict[str, Any]:
    """Evidence: the rate of a flow that crosses alone, how much the others gain without it, and a sentence's end.

    A flow that is slow alone as well is not slowed by its own kind. One that is fast alone, while packets queue even when no own
    flow runs, shares with strangers; one that is fast alone with no queue competes with the own flows for too little.
    """
    session.during = "flows one by one"
    full: list[float] = []
    less: list[float] = []
    alone: list[float] = []
    for _ in range(_REPEATS):
        flows = _crossing(session, item)
        full.append(float(np.mean(np.log(np.maximum(session.transfer(flows), 1.0))[1:])) if len(flows) > 1 else np.nan)
        less.append(float(np.mean(np.log(np.maximum(session.transfer(flows[1:]), 1.0)))) if len(flows) > 1 else np.nan)
        alone.append(float(np.log(max(session.transfer(flows[:1])[0], 1.0))))
    single = float(np.median(alone))
    gain = float(np.median(np.array(less) - full))
    slow_alone = np.log(item.control_bytes_per_s) - single > 2 * session.settings.least_log_loss
    foreign = bool(slow_alone or standing)
    said = "foreign traffic competes" if foreign else "a flow alone is not slow, our own flows compete"
    if slow_alone:
        said += f" (a flow alone is slow too, at {8e-6 * float(np.exp(single)):.1f} Mbit/s)"
    elif standing:
        said += " (packets queue in it while our flows rest)"
    return {
        "alone_bytes_per_s": float(np.exp(single)),
        "gain_without_one_share": float(np.expm1(gain)),
        "flows_share_it": bool(gain > _SHARES),
        "competitors": "foreign" if foreign else "own",
        "competitors_in_words": said,
    }


def _crossing(session: Session, item: Confirmed) -> np.ndarray:
    """(F, 2) flows from one group to the other, as many as can be disjoint."""
    sides = [session.rng.permutation(sorted(side)).tolist() for side in (item.part.senders, item.part.receivers)]
    return np.array(list(zip(*sides)), dtype=np.intp)
