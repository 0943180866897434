"""Which leaves and which paths between leaves a survey makes suspicious. Pure numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cluster.fabric.probing import Figures, Flows
from cluster.fabric.wide.evidence import Ends
from cluster.fabric.wide.layout import Layout
from cluster.fabric.wide.survey import Crossing, Survey

_MOST_LEAVES, _MOST_PATHS = 6, 200
"""Budget: suspects that the rounds after the survey have flows for."""
_LEAST_Z = 2.0
"""Statistics: enough to suspect a leaf, not to accuse it."""
_SLOW_FAR = 0.8
"""Effect of interest: times the smallest loss of interest that makes a path suspect."""
_FAST = math.log(0.88)
"""Effect of interest: a flow that lost less than about the smallest loss of interest ran as if alone."""
_FLOOR = math.log(0.2)
"""Statistics: slower flows count as this slow, lest one outlier stand for many."""


@dataclass(frozen=True, kw_only=True)
class SuspectLeaf:
    """All that a leaf sends upwards (side 0), or receives from there (side 1)."""

    leaf: int
    side: int


def suspect_leaves(survey: Survey) -> list[SuspectLeaf]:
    """Leaves whose traffic is slower than the others': the median flow where flows run alone, ranks of sums where not."""
    found: list[SuspectLeaf] = []
    if not survey.crossings:
        return found
    for side in (0, 1):
        scores = _medians(survey, side) if survey.collision_free else _z_values(survey, side)
        bound = 0.75 * survey.least if survey.collision_free else _LEAST_Z
        for leaf in np.argsort(scores, kind="stable")[:_MOST_LEAVES]:
            if scores[leaf] < -bound:
                found.append(SuspectLeaf(leaf=int(leaf), side=side))
    return found


def suspect_paths(survey: Survey, leaves: list[SuspectLeaf]) -> list[tuple[int, int]]:
    """Pairs of which one end is slow to, or from, all other leaves, and well under its own; not of a suspect leaf.

    Where flows share cables, slowness between leaves says nothing of a single path: none is suspected.
    """
    if not survey.collision_free:
        return []
    crossings = [_apart_from(leaves, crossing, survey.layout) for crossing in survey.crossings]
    far = Ends(len(survey.good))
    for flows, logs in crossings:
        far.add(flows, logs)
    found: dict[tuple[int, int], tuple[float, tuple[int, int]]] = {}
    for side in (0, 1):
        slow = (far.seen(side) >= 2) & (far.best(side) < -_SLOW_FAR * survey.least)
        for flows, logs in crossings:
            for pair, log in zip(
                flows[slow[flows[:, side]]].tolist(), logs[slow[flows[:, side]]].tolist(), strict=True
            ):
                found[side, pair[side]] = min(found.get((side, pair[side]), (0.0, (0, 0))), (log, (pair[0], pair[1])))
    return list(dict.fromkeys(pair for _, pair in sorted(found.values())))[:_MOST_PATHS]


def _apart_from(leaves: list[SuspectLeaf], crossing: Crossing, layout: Layout) -> tuple[Flows, Figures]:
    """Flows that pass no suspect leaf in the direction that is suspected."""
    kept = np.ones(len(crossing.flows), dtype=bool)
    for suspect in leaves:
        kept &= layout.leaf_of[crossing.flows[:, suspect.side]] != suspect.leaf
    return crossing.flows[kept], crossing.logs[kept]


def _medians(survey: Survey, side: int) -> Figures:
    leaves = np.concatenate([survey.layout.leaf_of[crossing.flows[:, side]] for crossing in survey.crossings])
    logs = np.concatenate([crossing.logs for crossing in survey.crossings])
    order = np.argsort(leaves, kind="stable")
    ends = np.cumsum(np.bincount(leaves, minlength=survey.layout.num_leaves))[:-1]
    return np.array([np.median(part) if len(part) else 0.0 for part in np.split(logs[order], ends)])


def _z_values(survey: Survey, side: int) -> Figures:
    """Sum over rounds of two scores: of the mean logarithm where all flows ran, of how many were fast where few did."""
    total = np.zeros(survey.layout.num_leaves)
    for crossing in survey.crossings:
        values = np.maximum(crossing.logs, _FLOOR) if crossing.everyone else (crossing.logs > _FAST).astype(np.float64)
        total += _standard_scores(values, survey.layout.leaf_of[crossing.flows[:, side]], survey.layout)
    return total / math.sqrt(len(survey.crossings))


def _standard_scores(values: Figures, leaves: np.ndarray, layout: Layout) -> Figures:
    count = np.bincount(leaves, minlength=layout.num_leaves)
    sums = np.bincount(leaves, weights=values - values.mean(), minlength=layout.num_leaves)
    return sums / (max(float(values.std()), 1e-9) * np.sqrt(np.maximum(count, 1)))
