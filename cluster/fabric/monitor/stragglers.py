"""From windows to findings: a rank that works longer than its peers, a group whose network has become slower.

What lasts for three windows and makes at least a tenth is told, once, with the step since which and what it costs.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from statistics import median

from cluster.fabric.findings import Finding, Kind
from cluster.fabric.monitor.windows import GroupKey, Window, knows_work
from cluster.fabric.statistics import ChangePoint, change_points, contrast

PERSISTENCE = 3
"""Windows that something must last for."""
LEAST_EFFECT = 0.10
"""Of a rank's work, or of the time that a group's network takes."""
LEAST_COST_SHARE = 0.02
"""Of a step: what costs less is not worth a sentence."""
_DOUBT = 0.01
"""Greatest probability of a straggler that is none, over all ranks."""
_KEPT_WINDOWS = 48
_FALSE_ALARMS = 1e-4
"""Of a whole series without a change; low, since the question is asked anew after each window."""


@dataclass(frozen=True, kw_only=True)
class _Straggler:
    rank: int
    knows_work: bool
    """Whether the two figures are of work, or of lateness."""
    own_s: float
    peers_s: float
    num_peers: int
    cost_s: float
    effect: float
    confidence: float
    since_step: int


@dataclass(kw_only=True)
class _Series:
    """One figure, window by window."""

    values: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT_WINDOWS))
    first_steps: deque[int] = field(default_factory=lambda: deque(maxlen=_KEPT_WINDOWS))
    told: set[int] = field(default_factory=set)
    """First steps of changes that have been told."""

    def add(self, value: float, first_step: int) -> None:
        self.values.append(value)
        self.first_steps.append(first_step)

    def new_growth(self) -> tuple[ChangePoint, int] | None:
        """The last change, with the step it came with, where it is a growth that has not been told."""
        if min(self.values, default=0.0) <= 0.0:
            return None
        changes = change_points(
            list(self.values), min_effect=LEAST_EFFECT, persistence=PERSISTENCE, false_alarm_rate=_FALSE_ALARMS
        )
        if not changes or changes[-1].effect < LEAST_EFFECT:
            return None
        at = self.first_steps[changes[-1].index]
        lately = list(self.first_steps)[max(0, changes[-1].index - PERSISTENCE) :]
        if any(step in self.told for step in lately):  # the same one, its place estimated anew
            return None
        return changes[-1], at


class StragglerSearch:
    """Fed one window after another; each answer holds what is new."""

    def __init__(self, *, host_of: Callable[[int], str]) -> None:
        self._host_of = host_of
        self._last: deque[Window] = deque(maxlen=PERSISTENCE)
        self._stragglers: set[int] = set()
        self._floors: dict[GroupKey, _Series] = {}
        self._alone: dict[int, _Series] = {}

    @property
    def stragglers(self) -> frozenset[int]:
        """Ranks that are slow now."""
        return frozenset(self._stragglers)

    def add(self, window: Window) -> list[Finding]:
        """What this window shows for the first time."""
        self._last.append(window)
        return [*self._new_stragglers(window), *self._slowed_alone(window), *self._slow_groups(window)]

    def _new_stragglers(self, window: Window) -> list[Finding]:
        if len(self._last) < PERSISTENCE:
            return []
        now = _stragglers(self._last)
        new = [each for each in now if each.rank not in self._stragglers]
        # One that has been told is forgotten once it is clearly well, not when it comes near the threshold.
        still = {rank for rank in self._stragglers if _effect(window, rank) > LEAST_EFFECT / 2}
        self._stragglers = still | {each.rank for each in now}
        return [self._straggler_finding(each, window) for each in new]

    def _straggler_finding(self, found: _Straggler, window: Window) -> Finding:
        host = self._host_of(found.rank)
        figures = {"busy_s": found.own_s, "peers_busy_s": found.peers_s} if found.knows_work else {}
        return Finding(
            kind="slow_host",
            hosts=(host,),
            ranks=(found.rank,),
            confidence=found.confidence,
            evidence={
                "source": "monitor",
                "since_step": found.since_step,
                **figures,
                "cost_s_per_step": found.cost_s,
                "cost_share": found.cost_s / window.step_s,
                "late_s": window.late_s.get(found.rank, 0.0),
                "others_late_s": median([late for rank, late in window.late_s.items() if rank != found.rank] or [0.0]),
            },
            sentence=(
                f"rank {found.rank} on {host} holds the others up since step {found.since_step}: it {_comparison(found)}, "
                f"which costs {_ms(found.cost_s)} a step, {found.cost_s / window.step_s:.0%} of it (confidence "
                f"{found.confidence:.2f})."
            ),
        )

    def _slowed_alone(self, window: Window) -> list[Finding]:
        """Ranks that nobody can be compared with, as the stages of a pipeline without replicas: with their own past."""
        peers = Counter(window.roles.values())
        findings = []
        for rank, busy_s in window.busy_s.items():
            if peers[window.roles[rank]] > 1:
                continue
            series = self._alone.setdefault(rank, _Series())
            series.add(busy_s, window.first_step)
            growth = series.new_growth()
            if growth is None or growth[0].after - growth[0].before < LEAST_COST_SHARE * window.step_s:
                continue
            change, since = growth
            series.told.add(since)
            host = self._host_of(rank)
            cost = change.after - change.before
            findings.append(
                _change_finding(
                    "slow_host", (host,), (rank,), change, since, window,
                    f"rank {rank} on {host} has become slower at step {since}: it works for {_ms(change.after)} of a step, "
                    f"and worked for {_ms(change.before)} before (+{change.effect:.0%}), which may cost {_ms(cost)} a step",
                )
            )  # fmt: skip
        return findings

    def _slow_groups(self, window: Window) -> list[Finding]:
        """Groups whose shortest durations have grown: all their ranks wait for the network, not for one another."""
        grown: list[tuple[GroupKey, ChangePoint, int]] = []
        for key, floor_s in window.floor_s.items():
            series = self._floors.setdefault(key, _Series())
            series.add(floor_s, window.first_step)
            growth = series.new_growth()
            between = len({self._host_of(rank) for rank in key[1]}) > 1
            if growth is None or not between:
                continue
            change, since = growth
            if change.after - change.before >= LEAST_COST_SHARE * window.step_s:
                series.told.add(since)
                grown.append((key, change, since))
        if not grown:
            return []
        (axis, ranks), change, since = max(grown, key=lambda each: each[1].after - each[1].before)
        hosts = self._suspected([key for key, _, _ in grown], window)
        kind: Kind = "slow_link" if len(hosts) == 1 else "congested_uplink"
        where = f"the link of {hosts[0]}" if len(hosts) == 1 else f"something between {', '.join(hosts)}"
        groups = "" if len(grown) == 1 else f", and {len(grown) - 1} other group(s) with it"
        return [
            _change_finding(
                kind, hosts, ranks, change, since, window,
                f"collectives on {axis} (ranks {', '.join(map(str, ranks))}){groups} take {_ms(change.after)} of a step since "
                f"step {since}, and took {_ms(change.before)} before (+{change.effect:.0%}); none of the ranks is late: it is "
                f"{where}",
            )
        ]  # fmt: skip

    def _suspected(self, grown: Sequence[GroupKey], window: Window) -> tuple[str, ...]:
        """Hosts in all groups that have become slower and in none that has not; all in the former where that is nobody."""
        sets = [self._hosts(key) for key in grown]
        well = [self._hosts(key) for key in window.floor_s if key not in grown and len(self._hosts(key)) > 1]
        common = set.intersection(*sets).difference(*well) if len(sets) + len(well) > 1 else set()
        return tuple(sorted(common or set.union(*sets)))

    def _hosts(self, key: GroupKey) -> set[str]:
        return {self._host_of(rank) for rank in key[1]}


def _change_finding(
    kind: Kind,
    hosts: tuple[str, ...],
    ranks: tuple[int, ...],
    change: ChangePoint,
    since: int,
    window: Window,
    sentence: str,
) -> Finding:
    cost = change.after - change.before
    return Finding(
        kind=kind,
        hosts=hosts,
        ranks=ranks,
        confidence=change.confidence,
        evidence={
            "source": "monitor",
            "since_step": since,
            "before_s": change.before,
            "after_s": change.after,
            "cost_s_per_step": cost,
            "cost_share": cost / window.step_s,
        },
        sentence=f"{sentence} (confidence {change.confidence:.2f}).",
    )


def _stragglers(windows: Sequence[Window]) -> list[_Straggler]:
    """Ranks that work longer than their peers, or come later, in every one of the windows, and surely so over all of them."""
    ranks = windows[-1].roles
    slow: dict[int, tuple[float, float]] = {}
    for rank in ranks:
        if min(_effect(window, rank) for window in windows) < LEAST_EFFECT:
            continue
        all_effects = [effects for window in windows for effects in window.effects if rank in effects]
        sure = contrast([math.log1p(effects[rank]) for effects in all_effects])
        doubt = min(1.0, len(ranks) * sure.tail_beyond(math.log1p(LEAST_EFFECT / 2)))
        if doubt < _DOUBT:
            slow[rank] = (math.expm1(sure.mean), doubt)
    found = (_weigh(rank, *slow[rank], slow.keys(), windows) for rank in slow)
    return [each for each in found if each.cost_s >= LEAST_COST_SHARE * windows[-1].step_s]


def _weigh(rank: int, effect: float, doubt: float, slow: Collection[int], windows: Sequence[Window]) -> _Straggler:
    """What one costs: the step lasts as long as the slowest works, and without it as long as the slowest of the others."""
    roles = windows[-1].roles
    others = [other for other in roles if other != rank and roles[other] == roles[rank]]
    peers = [other for other in others if other not in slow] or others
    burdens = [burden for window in windows for burden in window.burdens]
    own = {each: median([burden[each] for burden in burdens if each in burden] or [0.0]) for each in (rank, *peers)}
    return _Straggler(
        rank=rank,
        knows_work=all(knows_work(sample) for window in windows for sample in window.samples),
        own_s=own[rank],
        peers_s=median(own[peer] for peer in peers),
        num_peers=len(peers),
        cost_s=own[rank] - max(own[peer] for peer in peers),
        effect=effect,
        confidence=1.0 - doubt,
        since_step=windows[0].first_step,
    )


def _comparison(found: _Straggler) -> str:
    if not found.knows_work:
        peers = "its only peer" if found.num_peers == 1 else f"its {found.num_peers} peers"
        return f"comes to the collectives {_ms(found.own_s - found.peers_s)} a step later than {peers}"
    peers = "its only peer needs" if found.num_peers == 1 else f"its {found.num_peers} peers need"
    return f"works for {_ms(found.own_s)} of a step where {peers} {_ms(found.peers_s)} (+{found.effect:.0%})"


def _effect(window: Window, rank: int) -> float:
    return median([effects[rank] for effects in window.effects if rank in effects] or [0.0])


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
