"""Which few slow parts of the network explain all measured rates. Pure numpy.

The model of one flow's rate, with the physics of a path as fast as its slowest part:

    log rate = mu + min(0, effect of every slow part that the flow passes) + noise

A part is a rectangle of the pair matrix: a row (sender), a column (receiver), a cell (path) or a block (uplink). Parts are
added one by one, each time the one that makes the measurements most likely; that is median polish with a sparse set of
effects, and a loss that outliers cannot dominate. A part must be worth the price of naming it, which grows with the
logarithm of the number of parts of its kind, so that noise alone buys none (the minimum description length: Rissanen, 1978).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cluster.fabric.analysis.observations import Observations
from cluster.fabric.probing import Figures, Flows
from cluster.fabric.statistics import robust_spread

PartKind = Literal["sender", "receiver", "path", "uplink"]
Mask = NDArray[np.bool_]

_HEALTHY_QUANTILE = 75
"""Physics: percentile of rates taken as healthy at first: an uplink congested both ways slows more than half of all pairs."""
_MOST_TRIALS = 60
"""Budget: of time, a step of the search."""
_FEWEST_FOR_A_SPREAD = 6
"""Statistics: measurements from which on a part's own spread is estimated; of fewer it would mostly be chance."""
_MOST_PARTS = 6
"""Effect of interest: as many faults at once as anyone may hope to tell apart."""
_PRICE_OF_A_LEVEL = 3.0
"""Statistics: of one more effect of an uplink, for another number of flows at once."""
_EXHAUSTIVE = 10
"""Budget: up to this many endpoints all ways to divide them in two are tried as groups with an uplink between them."""
_PRICE_OF_MIXTURE = 10.0
"""Statistics (a prior): of an uplink between groups that are no neighbours in the order of ranks: launchers mostly give
neighbouring ranks to neighbours."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the network that flows from some endpoints to some others pass."""

    kind: PartKind
    senders: frozenset[int]
    receivers: frozenset[int]

    def passed_by(self, flows: Flows) -> Mask:
        """(F,) whether each flow passes it."""
        return np.isin(flows[:, 0], list(self.senders)) & np.isin(flows[:, 1], list(self.receivers))

    @property
    def host(self) -> int:
        """Of a sender or receiver: the endpoint."""
        return next(iter(self.senders if self.kind == "sender" else self.receivers))


def sender(endpoint: int, count: int) -> Part:
    """All that `endpoint` of `count` sends."""
    return Part(kind="sender", senders=frozenset([endpoint]), receivers=frozenset(range(count)) - {endpoint})


def receiver(endpoint: int, count: int) -> Part:
    """All that `endpoint` of `count` receives."""
    return Part(kind="receiver", senders=frozenset(range(count)) - {endpoint}, receivers=frozenset([endpoint]))


def path(source: int, sink: int) -> Part:
    """From one endpoint to one other."""
    return Part(kind="path", senders=frozenset([source]), receivers=frozenset([sink]))


def uplink(sources: frozenset[int], sinks: frozenset[int]) -> Part:
    """From one group of endpoints to another."""
    return Part(kind="uplink", senders=sources, receivers=sinks)


@dataclass(frozen=True, kw_only=True)
class Suspicion:
    """A part that would explain what was measured."""

    part: Part
    effect: float
    """Logarithm of the share of the healthy rate that is left where it is slowest; below zero."""
    worth: float
    """By how much it makes the measurements more likely, in logarithms, less its price."""
    spread: float
    """Standard deviation of the logarithm of a rate that it determines: foreign traffic and lost packets make rates erratic."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The parts that explain the measurements best, and what is left."""

    suspicions: tuple[Suspicion, ...]
    healthy_log_rate: float
    worth: float
    """Logarithm of the likelihood, up to a constant of the measurements, less the prices of the parts."""


def divisions(count: int, leaves: Sequence[str | None]) -> list[frozenset[int]]:
    """Groups of endpoints that may share an uplink: by the names of leaf switches, by order, and, of a few, all."""
    groups: dict[frozenset[int], None] = {}
    named = {leaf for leaf in leaves if leaf is not None}
    for leaf in sorted(named):
        groups[frozenset(index for index in range(count) if leaves[index] == leaf)] = None
    if not named:
        for start in range(count):
            groups[frozenset(range(start))] = None
        for size in (2**power for power in range(1, count.bit_length())):
            groups |= {frozenset(range(start, min(start + size, count))): None for start in range(0, count, size)}
        if count <= _EXHAUSTIVE:
            for size in range(2, count // 2 + 1):
                groups |= dict.fromkeys(map(frozenset, itertools.combinations(range(count), size)))
    everyone = frozenset(range(count))
    sides = {side: None for group in groups for side in (group, everyone - group)}
    return [side for side in sides if 2 <= len(side) <= count - 2]


def explain(seen: Observations, *, leaves: Sequence[str | None], least_effect: float) -> Explanation:
    """The best of several greedy explanations: without any uplink, and starting with each of the likeliest uplinks.

    Args:
        seen: all pairs, both ways; more than once.
        leaves: name of each endpoint's leaf switch, None where unknown.
        least_effect: smallest share of the rate lost that is of interest.
    """
    search = _Search(seen, divisions(seen.num_endpoints, leaves), math.log1p(-least_effect))
    best = search.greedy(())
    for first in search.likeliest_uplinks():
        other = search.greedy((first,))
        if other.worth > best.worth:
            best = other
    return best


def _mixed(part: Part) -> bool:
    """Whether neither of an uplink's groups is a stretch of the order of ranks."""
    groups = (part.senders, part.receivers)
    return part.kind == "uplink" and all(max(group) - min(group) >= len(group) for group in groups)


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """One part, given the others' effects. Arrays (K,): one entry an observation."""

    effects: Figures
    ruled: Mask
    """Where it is slower than the others."""
    spread: float
    strongest: float
    worth: float


class _Search:
    """Candidate parts, which observations each is passed by, and the greedy choice among them."""

    def __init__(self, seen: Observations, sides: Sequence[frozenset[int]], least: float) -> None:
        count = seen.num_endpoints
        everyone = frozenset(range(count))
        pairs = sorted({(int(a), int(b)) for a, b in seen.flows})
        self.parts = [sender(index, count) for index in range(count)]
        self.parts += [receiver(index, count) for index in range(count)]
        self.parts += [path(a, b) for a, b in pairs]
        self.parts += [uplink(side, everyone - side) for side in sides]
        totals = {
            kind: sum(part.kind == kind for part in self.parts) for kind in ("sender", "receiver", "path", "uplink")
        }
        self._price = [3.0 + math.log(totals[part.kind]) + _PRICE_OF_MIXTURE * _mixed(part) for part in self.parts]
        self._uplinks = np.array([part.kind == "uplink" for part in self.parts])
        self._sends = np.zeros((len(self.parts), count), dtype=bool)
        self._receives = np.zeros((len(self.parts), count), dtype=bool)
        for row, part in enumerate(self.parts):
            self._sends[row, list(part.senders)] = True
            self._receives[row, list(part.receivers)] = True
        self._flows = seen.flows
        self._logs = seen.log_rates
        self._rounds = seen.rounds
        self._least = least
        self._noise = seen.noise()
        self._mu = _healthy_level(self._logs, self._noise)

    def _likely(self, effects: Figures, spreads: Figures, allowed: Mask) -> list[int]:
        """Indices of the parts, the likeliest first, that are worth a trial: their flows are slower than yet explained."""
        count = self._sends.shape[1]
        low = np.clip((self._logs - self._mu - effects) / spreads, -4, 4)
        sums, flows = np.zeros((count, count)), np.zeros((count, count))
        np.add.at(sums, (self._flows[:, 0], self._flows[:, 1]), low)
        np.add.at(flows, (self._flows[:, 0], self._flows[:, 1]), 1.0)
        total = ((self._sends @ sums) * self._receives).sum(axis=1)
        number = np.maximum(((self._sends @ flows) * self._receives).sum(axis=1), 1.0)
        likely = np.flatnonzero((total / number < -0.5) & allowed)
        return [int(index) for index in likely[np.argsort(total[likely] / np.sqrt(number[likely]))][:_MOST_TRIALS]]

    def likeliest_uplinks(self, most: int = 6) -> list[int]:
        """Indices of the uplinks that explain most by themselves."""
        nothing = np.zeros(self._logs.size)
        spreads = np.full(self._logs.size, self._noise)
        worths = [
            (self._tried(index, nothing, spreads).worth, index)
            for index in self._likely(nothing, spreads, self._uplinks)
        ]
        return [index for worth, index in sorted(worths, reverse=True)[:most] if worth > 0]

    def greedy(self, first: Sequence[int]) -> Explanation:
        """Adds the worthiest part until none is worth its price.

        first: indices of uplinks to begin with. Without them there shall be none: two slow hosts together look at first like
        a slow uplink of the two, which is a greater gain in one step than either host, though a worse explanation.
        """
        allowed = ~self._uplinks | bool(first)
        effects = np.zeros(self._logs.size)
        spreads = np.full(self._logs.size, self._noise)
        chosen: list[tuple[int, _Trial]] = []
        queue = list(first)
        while len(chosen) < _MOST_PARTS:
            if queue:
                index = queue.pop(0)
            else:
                tries = [
                    (self._tried(index, effects, spreads).worth, index)
                    for index in self._likely(effects, spreads, allowed)
                ]
                if not tries or max(tries)[0] <= 0:
                    break
                index = max(tries)[1]
            trial = self._tried(index, effects, spreads)
            if trial.worth == -math.inf:
                break
            effects, spreads = np.minimum(effects, trial.effects), np.where(trial.ruled, trial.spread, spreads)
            chosen.append((index, trial))
        suspicions = tuple(
            Suspicion(part=self.parts[index], effect=trial.strongest, worth=trial.worth, spread=trial.spread)
            for index, trial in chosen
        )
        left = (self._logs - self._mu - effects) / spreads
        price = sum(self._price[index] for index, *_ in chosen)
        return Explanation(
            suspicions=suspicions,
            healthy_log_rate=self._mu,
            worth=-_loss(left) - float(np.log(spreads / self._noise).sum()) - price,
        )

    def _tried(self, index: int, effects: Figures, spreads: Figures) -> _Trial:
        """What the part would explain, given the others' effects."""
        mask = self._sends[index, self._flows[:, 0]] & self._receives[index, self._flows[:, 1]]
        below = self._logs - self._mu
        part_effects = np.zeros_like(below)
        levels = self._loads(mask) if self.parts[index].kind == "uplink" else np.zeros(int(mask.sum()), dtype=np.intp)
        strongest, used, floor = 0.0, 0, 0.0
        for level in np.unique(levels):
            members = np.flatnonzero(mask)[levels == level]
            # A part shows only in flows that no other part slows more: the median of those, found in two steps.
            effect = float(np.median(below[members]))
            free = members[effects[members] > effect]
            effect = float(np.median(below[free])) if free.size else effect
            # An uplink that bears more flows gives each of them no more.
            effect = min(effect, floor)
            if effect < 0.6 * self._least:
                part_effects[members] = effect
                strongest, used, floor = min(strongest, effect), used + 1, effect
        ruled = part_effects < effects
        left = below - np.minimum(effects, part_effects)
        few = int(ruled.sum()) < _FEWEST_FOR_A_SPREAD
        spread = self._noise if few else max(self._noise, robust_spread(left[ruled]))
        worth = -math.inf
        if ruled.any():
            # Its own spread, at the price that a wider distribution is lower everywhere: rates may be low and erratic.
            before = _loss((below - effects)[ruled] / spreads[ruled]) + float(np.log(spreads[ruled]).sum())
            after = _loss(left[ruled] / spread) + math.log(spread) * int(ruled.sum())
            worth = before - after - self._price[index] - _PRICE_OF_A_LEVEL * (used - 1)
        return _Trial(effects=part_effects, ruled=ruled, spread=spread, strongest=strongest, worth=worth)

    def _loads(self, mask: Mask) -> NDArray[np.intp]:
        """For each observation in the mask: how many flows of the same round are in it too."""
        rounds = self._rounds[mask]
        return np.bincount(rounds)[rounds]


def _loss(deviations: Figures) -> float:
    """Minus the log likelihood of deviations in units of the noise, by Student's t with three degrees of freedom."""
    return float(2.0 * np.log1p(deviations**2 / 3.0).sum())


def _healthy_level(logs: Figures, noise: float) -> float:
    """The mode of the rates that is nearest to an upper percentile, by mean shift with a window of three noises."""
    level = float(np.percentile(logs, _HEALTHY_QUANTILE))
    for _ in range(5):
        level = float(np.median(logs[np.abs(logs - level) < 3.0 * noise]))
    return level
