"""The rounds that look for suspects among very many endpoints: under each leaf, then from leaf to leaf."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cluster.fabric.probing import Figures, Flows
from cluster.fabric.stages.session import Session
from cluster.fabric.statistics import robust_spread
from cluster.fabric.wide.evidence import Ends
from cluster.fabric.wide.layout import Indices, Layout, Mask, layout_of, pairs_for, without

WITHIN_ROUNDS = 3
ACROSS_ROUNDS = 3
"""Budget: half of the dozen rounds of a diagnosis."""
_HASHED_SHARE = 0.25
"""Physics: of a leaf's endpoints that send out at once where flows may share a cable: most then run alone."""
_COLLISION_FREE, _FREE_SHARE = math.log(0.8), 0.6
"""Physics: rate, against that under one leaf, that at least this share of flows reaches where tables keep all apart."""
_FIRST_BYTES = 1 << 24
"""Budget: enough for 0.3 ms at 400 Gbit/s: the first round counts, and shows how large the others should be."""
_ALWAYS, _MOSTLY, _ON_AVERAGE = 0.7, 0.5, 1.0
"""Effect of interest: times the smallest loss of interest: whoever lost so much in every round is suspected, or in all but one
and on average."""
_MOST_SUSPECTS = 1 / 8
"""Budget: share of the endpoints; each suspect takes a good one as its partner."""
_SEEN = 4
"""Statistics: times that an end was slow beside few flows before it is suspected, where leaves are not known."""


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """A round from leaf to leaf."""

    flows: Flows
    logs: Figures
    """Logarithms of rates, relative to the round's median."""
    everyone: bool
    """Whether all endpoints sent."""


class Survey:
    """What was measured. Logarithms of rates are relative to what flows under one leaf get, which share nothing."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.layout: Layout = layout_of(session.endpoints)
        self.near = Ends(session.count)
        """Under leaves: rounds of all, then those that pair suspects with good ones."""
        self.far = Ends(session.count)
        """From leaf to leaf, relative to the round's median."""
        self.crossings: list[Crossing] = []
        self.collision_free = True
        """Whether flows from leaf to leaf ran as if alone when all ran at once."""
        self.level = 0.0
        """Logarithm of the rate of a flow under one leaf, or, where leaves are not known, of most flows when few run."""
        self.noise = 0.0
        """Standard deviation of the logarithm of one rate."""
        self.least = session.settings.least_log_loss
        self.suspects: Indices = np.zeros(0, dtype=np.intp)
        self.good: Mask = np.ones(session.count, dtype=bool)
        self.choosing_rounds = WITHIN_ROUNDS
        """Rounds of `near` that chose the suspects: those after them are fresh."""
        self._turn = WITHIN_ROUNDS

    def run(self) -> None:
        """Six rounds; where leaves are not known, twice the logarithm of the number of endpoints, and a few, at most."""
        if self.layout.num_leaves == 1:
            self._without_leaves()
        else:
            self._within_leaves()
            for number in range(ACROSS_ROUNDS):
                self._across_leaves(number)
        self.session.beta_s_per_byte = math.exp(-self.level)

    def _without_leaves(self) -> None:
        """Any two flows may share a cable: few run at once, until everyone was fast once, or slow in several of them."""
        session = self.session
        session.during = "transfers between pairs"
        session.num_bytes = max(_FIRST_BYTES, session.settings.least_bytes)
        open_ends = np.ones((2, session.count), dtype=bool)
        for number in range(2 * math.ceil(math.log2(session.count)) + 4):
            most = min(session.count // (4 if number else 8), int(open_ends.sum()))
            flows = pairs_for(open_ends, max(most, session.count // 16, 2), session.rng)
            logs = np.log(session.transfer(flows))
            if number == 0:
                self.level = float(np.median(logs))
                self.noise = robust_spread(logs[logs > self.level + _COLLISION_FREE])
                self._choose_size()
            self.near.add(flows, logs - self.level)
            open_ends = np.stack([self.near.best(side) for side in (0, 1)]) < -_ALWAYS * self.least
            seen = np.stack([self.near.seen(side) for side in (0, 1)])
            if (seen[open_ends] >= _SEEN).all():
                break
        self.good = np.logical_not(open_ends.any(axis=0))
        self.suspects = np.flatnonzero(open_ends.any(axis=0))
        self.choosing_rounds = number + 1

    def _within_leaves(self) -> None:
        self.session.during = "transfers between neighbours"
        session, spreads = self.session, []
        session.num_bytes = max(_FIRST_BYTES, session.settings.least_bytes)
        for shift in range(1, WITHIN_ROUNDS + 1):
            flows = self.layout.neighbours(shift)
            logs = np.log(session.transfer(flows))
            self.level = float(np.median(logs))
            spreads.append(robust_spread(logs))
            self.near.add(flows, logs - self.level)
            self._choose_size()
        self.noise = float(np.mean(spreads))
        self._suspect()

    def _choose_size(self) -> None:
        settings = self.session.settings
        wanted = int(math.exp(self.level) * settings.transfer_s)
        self.session.num_bytes = min(max(wanted, settings.least_bytes), settings.most_bytes)

    def _suspect(self) -> None:
        """Whoever was slow in every round so far, or in most and on average; the slowest, should they be too many."""
        means = np.stack([self.near.means(side) for side in (0, 1)])
        best = np.stack([self.near.best(side) for side in (0, 1)])
        second = np.stack([self.near.best(side, rank=2) for side in (0, 1)])
        mostly = (means < -_ON_AVERAGE * self.least) & (second < -_MOSTLY * self.least)
        slow = mostly | (best < -_ALWAYS * self.least)
        if not len(self.suspects):
            self.good = np.logical_not(slow.any(axis=0))
        worst = np.where(slow, means, 0.0).min(axis=0)
        most = max(int(_MOST_SUSPECTS * self.session.count), 4)
        self.suspects = np.sort(np.argsort(worst, kind="stable")[: min(most, int((worst < 0).sum()))])

    def _across_leaves(self, number: int) -> None:
        """Shifts far apart, so that all levels are crossed. The first round shows whether flows share cables."""
        self.session.during = "transfers between leaves"
        everyone = number == 0 or self.collision_free
        flows = self._shifted(number, None if everyone else max(2, int(_HASHED_SHARE * self.layout.leaf_size)))
        if number == 0:
            logs = np.log(self.session.transfer(flows)) - self.level
        else:
            flows, logs = self.measure_with_repairs(flows)
            self._suspect()
        if everyone:
            self.collision_free = float(np.quantile(logs, 1 - _FREE_SHARE)) > _COLLISION_FREE
        logs = logs - np.median(logs)
        self.far.add(flows, logs)
        self.crossings.append(Crossing(flows=flows, logs=logs, everyone=everyone))

    def _shifted(self, number: int, most: int | None) -> Flows:
        """A shift by about a half, a third or a fifth of all leaves: the one that leaves the fewest flows within a host."""
        leaves = self.layout.num_leaves
        about = (leaves // 2, leaves // 3, leaves // 5 + 1)[number]
        shifts = {(about + more) % leaves or 1 for more in range(3)}
        return max((self.layout.across(shift, most=most, rng=self.session.rng) for shift in sorted(shifts)), key=len)

    def measure_with_repairs(self, flows: Flows) -> tuple[Flows, Figures]:
        """One round of `flows` beside others that pair each suspect with good ones; those of `flows` that fitted in."""
        repairs = self.layout.repairs(self.suspects, self.good, 3 * self._turn)
        self._turn += 1
        flows = without(flows, repairs)
        logs = np.log(self.session.transfer(np.concatenate([repairs, flows]))) - self.level
        self.near.add(repairs, logs[: len(repairs)])
        return flows, logs[len(repairs) :]
