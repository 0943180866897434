"""Slow parts of a wide network: a survey of all, then a few rounds that compare the suspects with flows beside them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cluster.fabric.analysis.explain import Part, path, receiver, sender, uplink
from cluster.fabric.analysis.judgement import Slow
from cluster.fabric.probing import Figures, Flows
from cluster.fabric.stages.session import Session
from cluster.fabric.statistics import contrast
from cluster.fabric.wide.layout import NO_FLOWS, without
from cluster.fabric.wide.survey import Survey
from cluster.fabric.wide.suspicion import SuspectLeaf, suspect_leaves, suspect_paths
from cluster.fabric.wide.together import without_scapegoats

_LEAST_ROUNDS = 2
_ROUNDS_WITHOUT_LEAVES = 6
"""Budget: of the comparison of suspects. Where leaves are not known, some rounds meet shared cables."""
_CERTAIN = 1.3
"""Effect of interest: times the smallest loss of interest that is named: among thousands of endpoints chance alone
reaches that loss."""
_FRESH, _SECOND_BEST = 1.2, 0.6
"""Effect of interest: the same of medians, and of all measurements but the best."""
_PATH_TAIL = 0.01
"""Statistics: of the measurements of a path by chance: there are two ends of a path for every endpoint, and few measurements
of each."""
_LEAST_SAMPLES = 4
"""Statistics: fewer measurements convict nobody."""
_MEETING = 0.2
"""Physics: share of flows between leaves that share a cable with another of the few."""
_ODD = 0.03
"""Physics: share of outliers on a network that is well."""
_UNEVEN = 0.2
"""Physics: standard deviation of the logarithm of what foreign traffic leaves, from cable to cable and moment to moment."""
_MEETING_DENSITY = 1 / 1.4
"""Physics: of their logarithms: anywhere between a tenth and three quarters lost."""
_LEAST_RATIO = 6.0
"""Statistics: logarithm of the ratio of likelihoods that convicts a leaf: 400 to 1, since some suspect leaves are tried."""
_LEAF_SHARE, _MOST_OF_A_LEAF = 0.2, 6
"""Budget: share of a suspect leaf's endpoints that send, or receive, in one round, and the most of them."""
_LEAF_SAMPLES = 12
_CONTROLS = 200
"""Budget: flows of a suspect leaf in all rounds, and control flows in each."""


def slow_network(session: Session) -> list[Slow]:
    """Eight rounds, for any number of endpoints under leaves of 30 or more; six where nothing is suspected.

    Where leaves are not known, two more for each doubling of the number; senders and receivers alone are told apart, and
    what many of them share.
    """
    survey = Survey(session)
    survey.run()
    confirmation = Confirmation(survey)
    return without_scapegoats(survey, confirmation.run()) if confirmation.needed else []


class Confirmation:
    """Suspects beside control flows, in rounds with few flows from leaf to leaf."""

    def __init__(self, survey: Survey) -> None:
        self._survey = survey
        self._session = survey.session
        self._leaves: dict[SuspectLeaf, list[float]] = {suspect: [] for suspect in suspect_leaves(survey)}
        suspected = suspect_paths(survey, list(self._leaves))
        share = int(_LEAF_SHARE * survey.layout.leaf_size)
        self._flows_of_a_leaf = min(max(share, 2), _MOST_OF_A_LEAF)
        self._paths: dict[tuple[int, int], list[float]] = {pair: [] for pair in suspected}

    @property
    def needed(self) -> bool:
        """Whether there is any suspect."""
        return bool(len(self._survey.suspects) or self._leaves or self._paths)

    def run(self) -> list[Slow]:
        """What is slow, each part with its evidence."""
        self._session.during = "the comparison of suspects"
        rounds = math.ceil(_LEAF_SAMPLES / self._flows_of_a_leaf) if self._leaves else _LEAST_ROUNDS
        rounds = rounds if self._survey.layout.num_leaves > 1 else _ROUNDS_WITHOUT_LEAVES
        for number in range(rounds):
            self._round(number)
        return [*self._slow_ends(), *self._slow_leaves(), *self._slow_paths()]

    def _round(self, number: int) -> None:
        survey = self._survey
        paths = _disjoint(list(self._paths))
        partners = survey.good.copy()
        partners[paths.ravel()] = False
        repairs = survey.layout.repairs(survey.suspects, partners, 3 * number + 11)
        crossing, owners = self._leaf_flows(np.concatenate([paths, repairs]))
        suspected = np.concatenate([paths, crossing, repairs])
        controls = without(survey.layout.neighbours(number + 1), suspected, survey.good)
        # Without leaves to keep flows apart, controls in number would share the suspects' cables.
        most = _CONTROLS if survey.layout.num_leaves > 1 else max(self._session.count // 16, 2)
        controls = controls[:: max(1, len(controls) // most)]
        logs = np.log(self._session.transfer(np.concatenate([suspected, controls])))
        logs -= np.median(logs[len(suspected) :])
        for pair, log in zip(paths.tolist(), logs.tolist()):
            self._paths[pair[0], pair[1]].append(log)
        for suspect, log in zip(owners, logs[len(paths) :].tolist()):
            self._leaves[suspect].append(log)
        survey.near.add(repairs, logs[len(suspected) - len(repairs) : len(suspected)])

    def _leaf_flows(self, taken: Flows) -> tuple[Flows, list[SuspectLeaf]]:
        """A few flows for each suspect leaf, each to or from another leaf that nobody suspects."""
        layout, rng = self._survey.layout, self._session.rng
        suspected = {suspect.leaf for suspect in self._leaves}
        others = [leaf for leaf in range(layout.num_leaves) if leaf not in suspected]
        flows: list[tuple[int, int]] = []
        owners: list[SuspectLeaf] = []
        busy = [set(taken[:, 0].tolist()), set(taken[:, 1].tolist())]
        for suspect in self._leaves:
            inside = [int(end) for end in rng.permutation(layout.members[suspect.leaf]) if self._survey.good[end]]
            for end, leaf in zip(inside[: self._flows_of_a_leaf], rng.permutation(others)):
                partners = (int(other) for other in rng.permutation(layout.members[leaf]) if self._survey.good[other])
                partners = (other for other in partners if layout.host_of[other] != layout.host_of[end])
                partner = next((other for other in partners if other not in busy[1 - suspect.side]), None)
                if partner is None or end in busy[suspect.side]:
                    continue
                busy[suspect.side].add(end)
                busy[1 - suspect.side].add(partner)
                flows.append((end, partner) if suspect.side == 0 else (partner, end))
                owners.append(suspect)
        return np.array([*NO_FLOWS.tolist(), *flows], dtype=np.intp).reshape(-1, 2), owners

    def _slow_ends(self) -> list[Slow]:
        survey, count = self._survey, self._session.count
        found = []
        for side, part in ((0, sender), (1, receiver)):
            for end in survey.suspects.tolist():
                logs = survey.near.samples(side, end)
                fresh = survey.near.samples(side, end, since=survey.choosing_rounds)
                if self._is_slow(logs, fresh, least_fresh=3):
                    found.append(self._slow(part(end, count), logs))
        return found

    def _slow_leaves(self) -> list[Slow]:
        everyone = frozenset(range(self._session.count))
        found = []
        for suspect, logs in self._leaves.items():
            if self._is_congested(np.array(logs)):
                inside = frozenset(self._survey.layout.members[suspect.leaf].tolist())
                ends = (inside, everyone - inside)
                part = uplink(*(ends if suspect.side == 0 else ends[::-1]))
                said = (
                    f"slow with {self._flows_of_a_leaf} of our flows too, as it carries foreign traffic or lost cables"
                )
                found.append(self._slow(part, np.array(logs), competitors="foreign", competitors_in_words=said))
        return found

    def _is_congested(self, logs: Figures) -> bool:
        """Whether all flows lose something is likelier than that most lose nothing, and some share a cable by chance."""
        if len(logs) < _LEAST_SAMPLES or -logs.mean() < self._survey.least:
            return False
        meeting = _ODD if self._survey.collision_free else _MEETING
        well = (1 - meeting) * _normal(logs, max(1.2 * self._survey.noise, 0.02)) + meeting * _MEETING_DENSITY
        slow = _normal(logs - logs.mean(), max(_UNEVEN, float(logs.std())))
        return float(np.log(np.maximum(slow, 1e-6) / well).sum()) > _LEAST_RATIO

    def _slow_paths(self) -> list[Slow]:
        found = []
        ends = {(item.part.kind, item.part.host) for item in self._slow_ends() if item.part is not None}
        for (source, sink), fresh in self._paths.items():
            logs = np.concatenate([self._slow_end(source, sink), fresh])
            apart = ("sender", source) not in ends and ("receiver", sink) not in ends
            again = len(fresh) > 0 and -max(fresh) >= _SECOND_BEST * self._survey.least
            if apart and again and self._is_slow(logs, np.array(fresh), least_fresh=2):
                slow = self._slow(path(source, sink), logs)
                found += [slow] if slow.tail < _PATH_TAIL else []
        return found

    def _slow_end(self, source: int, sink: int) -> Figures:
        """What the survey saw of the end of a path that was slow to, or from, all other leaves."""
        far = self._survey.far
        senders, receivers = far.samples(0, source), far.samples(1, sink)
        return senders if senders.max(initial=-np.inf) < receivers.max(initial=-np.inf) else receivers

    def _is_slow(self, logs: Figures, fresh: Figures, *, least_fresh: int) -> bool:
        """By all measurements, by those after the suspicion, which did not choose them, and by all but the best one.

        The last keeps out what a few outliers, or a few flows with a slow partner, make slow on average.
        """
        least = self._survey.least
        enough = len(logs) >= _LEAST_SAMPLES and len(fresh) >= least_fresh
        return enough and bool(
            -logs.mean() >= _CERTAIN * least
            and -np.median(logs) >= _FRESH * least
            and -np.median(fresh) >= _FRESH * least
            and -np.sort(logs)[-2] >= _SECOND_BEST * least
        )

    def _slow(self, part: Part, logs: Figures, **evidence: Any) -> Slow:
        loss = contrast(-logs, known_spread=1.2 * self._survey.noise, known_dof=6)
        rate = float(np.exp(self._survey.level))
        figures = {
            "bytes_per_s": rate * float(np.exp(np.median(logs))),
            "control_bytes_per_s": rate,
            "comparisons": loss.count,
        }
        return Slow(part=part, log_loss=loss.mean, tail=loss.tail_beyond(0.0), evidence={**figures, **evidence})


def _normal(values: Figures, spread: float) -> Figures:
    """Density."""
    return np.exp(-0.5 * (values / spread) ** 2) / (spread * math.sqrt(2 * math.pi))


def _disjoint(pairs: list[tuple[int, int]]) -> Flows:
    """Those that share no sender and no receiver with one before them."""
    senders: set[int] = set()
    receivers: set[int] = set()
    kept = []
    for source, sink in pairs:
        if source not in senders and sink not in receivers:
            kept.append((source, sink))
            senders.add(source)
            receivers.add(sink)
    return np.array(kept, dtype=np.intp).reshape(-1, 2)
