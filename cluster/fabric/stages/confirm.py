"""Confirms suspicions by fresh comparisons: the suspect's flows beside flows that nobody suspects.

A comparison is a difference of logarithms within one round, so that what happens to the whole fabric or machine cancels. A host
is compared while it sends and receives at once, as in training: lost packets show then, and hardly in one flow alone. Where
one way looks like a side effect of the other (a slow link's queue delays acknowledgements as well), it is tried alone.

Two tests accuse: that of the mean, and that of accidents: how often a flow is clearly slow, against how often unsuspected
flows are. Lost packets leave most transfers alone and make a few very slow, which a mean of few values does not show.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cluster.fabric.analysis.explain import Part, Suspicion, receiver, sender, uplink
from cluster.fabric.stages.session import Session
from cluster.fabric.statistics import Contrast, binomial_tail, contrast, student_tail

_LEAST_REPEATS, _MOST_REPEATS = 4, 14
"""Budget: fewer have no spread of their own; what is open after so many is not worth more time."""
_MOST_SUSPECT_HOSTS = 6
"""Budget: as many as the search for explanations names at most."""
_EVIDENT, _TRUST = 10.0, 20.0
"""Statistics: a part whose suspicion made the screening more likely by this much (a logarithm) may be confirmed at a tail this
many times as wide: the two are independent measurements."""
_SIDE_EFFECT = 0.75
"""Physics: a loss one way that is less than this share of the other way's may be a side effect, and is tried alone."""
_SLOWEST = 5.0
"""Statistics: an accident counts as at most this many times slower in the mean time of a byte, lest one decide all."""
_FASTEST = 1.2
"""Physics: faster than this a flow only seems: its first bytes came late."""
_SHARE_OF_TIME = 0.65
"""Budget: of the time for repeats that the comparisons of network parts may use; the rest is for compute and for evidence."""


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """A part that fresh measurements found slow."""

    part: Part
    loss: Contrast
    """Of the logarithm of the rate, against control flows; above zero."""
    tail: float
    """Probability of such a measurement if the part were well."""
    bytes_per_s: float
    control_bytes_per_s: float
    """Medians."""


@dataclass
class _Case:
    """Comparisons of one part."""

    part: Part
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    controls: list[float] = field(default_factory=list)
    state: str = "open"


class Confirmation:
    """The cases of one diagnosis. Sender and receiver of a host, and both ways of an uplink, are always tried together."""

    def __init__(self, session: Session, suspicions: Sequence[Suspicion], *, tried: Sequence[Part] = ()) -> None:
        """tried: parts that were suspected before; they are not tried again, but no control flow passes them."""
        self._session = session
        self._noise = session.seen.noise()
        parts = [suspicion.part for suspicion in suspicions]
        self._suspected = [*parts, *tried]
        self._spreads: Mapping[Part, float] = {suspicion.part: suspicion.spread for suspicion in suspicions}
        self._evident = {suspicion.part for suspicion in suspicions if suspicion.worth > _EVIDENT}
        self._accident = max(0.5 * session.settings.least_log_loss, 4.0 * self._noise)
        self._accident_rate = self._usual_accidents()
        count = session.count
        hosts = [part.host for part in parts if part.kind in ("sender", "receiver")][:_MOST_SUSPECT_HOSTS]
        self._hosts = list(dict.fromkeys(hosts))
        self._cases: dict[Part, _Case] = {}
        for host in self._hosts:
            self._open(sender(host, count), receiver(host, count))
        for part in parts:
            if part.kind == "path":
                self._open(part)
            elif part.kind == "uplink":
                self._open(part, uplink(part.receivers, part.senders))
        self._siblings: dict[Part, tuple[_Case, _Case]] = {
            part: (_Case(part=sender(min(part.senders), count)), _Case(part=receiver(min(part.receivers), count)))
            for part in self._cases
            if part.kind == "path"
        }

    def _open(self, *parts: Part) -> None:
        for part in parts:
            self._cases.setdefault(part, _Case(part=part))

    def _usual_accidents(self) -> float:
        """Probability that a flow that passes nothing suspected is clearly slow, from the screening; not underestimated."""
        seen = self._session.seen
        clear = ~np.any([part.passed_by(seen.flows) for part in self._suspected], axis=0)
        logs = seen.log_rates[clear]
        slow = int(np.sum(logs < np.median(logs) - self._accident)) if logs.size else 0
        return (slow + 1) / (logs.size + 2)

    def run(self) -> list[Confirmed]:
        """Repeats until each case is decided, or time or patience is spent."""
        self._session.during = "the comparison of suspects"
        for repeat in range(_MOST_REPEATS):
            self._host_rounds()
            self._path_rounds()
            self._uplink_rounds()
            if repeat + 1 >= _LEAST_REPEATS:
                self._decide()
                if not self._open_cases() or not self._session.in_time(_SHARE_OF_TIME):
                    break
        self._try_side_effects()
        self._session.read_counters()
        return [self._confirmed(case) for case in self._cases.values() if case.state == "slow"]

    def _try_side_effects(self) -> None:
        """The lesser loss of a host that is slow both ways, again, one way alone."""
        count = self._session.count
        for host in self._hosts:
            both = [self._cases[sender(host, count)], self._cases[receiver(host, count)]]
            if any(case.state != "slow" for case in both):
                continue
            weak, strong = sorted(both, key=lambda case: self._loss(case).mean)
            if self._loss(weak).mean < _SIDE_EFFECT * self._loss(strong).mean:
                self._cases[weak.part] = fresh = _Case(part=weak.part)
                for _ in range(_LEAST_REPEATS):
                    partner = self._partner(host, weak.part.kind, set())
                    if partner is not None:
                        self._compare([(host, partner) if weak.part.kind == "sender" else (partner, host)], [fresh])
                self._decide()

    def spoilt_paths(self) -> list[Suspicion]:
        """Senders and receivers that were slow in more than the one path that was suspected."""
        slow = []
        for part, siblings in self._siblings.items():
            for case in siblings if not self._blocks(part) else ():
                loss = self._loss(case)
                if loss.mean > 0.5 * self._session.settings.least_log_loss and loss.tail_beyond(0.0) < 0.01:
                    slow.append(Suspicion(part=case.part, effect=-loss.mean, worth=0.0, spread=self._noise))
        return slow

    def _open_cases(self) -> list[_Case]:
        return [case for case in self._cases.values() if case.state == "open"]

    def _loss(self, case: _Case) -> Contrast:
        spread = self._spreads.get(case.part, 0.0)
        return contrast(case.losses, known_spread=max(1.2 * self._noise, spread), known_dof=8)

    def _decide(self) -> None:
        settings = self._session.settings
        least = settings.least_log_loss
        for case in self._open_cases():
            loss = self._loss(case)
            if loss.count < _LEAST_REPEATS:
                continue
            allowed = settings.false_alarm_rate * (_TRUST if case.part in self._evident else 1.0) / len(self._cases)
            if self._tail(case) < allowed and self._mean_loss(case) >= 0.9 * least:
                case.state = "slow"
            elif self._like_its_ends(case):
                case.state = "well"
            elif student_tail((least - loss.mean) / loss.standard_error, loss.dof) < 0.02:
                case.state = "well" if self._accidents(case) > 0.02 else case.state

    def _like_its_ends(self, case: _Case) -> bool:
        """Whether a path is hardly slower than other flows of its ends, which are slow themselves."""
        least = self._session.settings.least_log_loss
        mean = self._loss(case).mean
        elsewhere = [self._loss(sibling).mean for sibling in self._siblings.get(case.part, ())]
        return any(other > 0.5 * least and mean < 1.5 * other for other in elsewhere)

    def _mean_loss(self, case: _Case) -> float:
        """Logarithm of the mean time of a byte over that of the controls: what a user waits, accidents included."""
        slower = np.clip(np.exp(np.array(case.losses)), 1 / _FASTEST, _SLOWEST)
        return max(self._loss(case).mean, float(np.log(slower.mean())))

    def _accidents(self, case: _Case) -> float:
        """Probability of so many clearly slow flows if the part were well. A path's two ends and an uplink's many mix more."""
        if case.part.kind not in ("sender", "receiver"):
            return 1.0
        slow = int(np.sum(np.array(case.losses) > self._accident))
        return binomial_tail(slow, len(case.losses), self._accident_rate)

    def _tail(self, case: _Case) -> float:
        """Of the part's own loss; of a path also that it is slower than its ends are elsewhere."""
        least = self._session.settings.least_log_loss
        tail = min(self._loss(case).tail_beyond(0.4 * least), self._accidents(case))
        for sibling in self._siblings.get(case.part, ()):
            elsewhere = contrast(sibling.losses).mean if sibling.losses else 0.0
            paired = np.array(case.losses[: len(sibling.losses)]) - sibling.losses[: len(case.losses)]
            # Into a contended link each connection keeps its own share: the path must stand out from all of that.
            erratic = elsewhere > 0.5 * least
            more = contrast(paired, known_spread=1.7 * self._noise, known_dof=0 if erratic else 6)
            tail = max(tail, more.tail_beyond(max(least, elsewhere) if erratic else 0.3 * least))
        return tail

    def _confirmed(self, case: _Case) -> Confirmed:
        return Confirmed(
            part=case.part,
            loss=replace(self._loss(case), mean=self._mean_loss(case)),
            tail=self._tail(case),
            bytes_per_s=float(np.median(case.rates)),
            control_bytes_per_s=float(np.median(case.controls)),
        )

    def _host_rounds(self) -> None:
        """Each suspect host sends to one and receives from another, in as few rounds as it takes, beside control flows."""
        count = self._session.count
        hosts = dict.fromkeys(case.part.host for case in self._open_cases() if case.part.kind in ("sender", "receiver"))
        waiting = [int(host) for host in self._session.rng.permutation(list(hosts))] if hosts else []
        while waiting:
            flows: list[tuple[int, int]] = []
            roles: list[_Case] = []
            taken: set[int] = set(waiting)
            for host in list(waiting):
                # Two are left for a control flow.
                if flows and count - len({end for flow in flows for end in flow}) < 5:
                    break
                sink = self._partner(host, "sender", taken)
                source = self._partner(host, "receiver", taken if sink is None else {*taken, sink})
                if sink is not None:
                    flows, roles = [*flows, (host, sink)], [*roles, self._cases[sender(host, count)]]
                if source is not None:
                    flows, roles = [*flows, (source, host)], [*roles, self._cases[receiver(host, count)]]
                taken |= {end for end in (sink, source) if end is not None}
                waiting.remove(host)
            if flows:
                self._compare(flows, roles)

    def _path_rounds(self) -> None:
        """Each suspect path; then, at once, its sender to another and another to its receiver."""
        for case in self._open_cases():
            if case.part.kind != "path":
                continue
            (source,), (sink,) = case.part.senders, case.part.receivers
            self._compare([(source, sink)], [case])
            # Across a congested uplink the flows to compare with cross it as well.
            blocks = self._blocks(case.part)
            other = self._partner(source, "sender", {sink}, blocks)
            another = self._partner(sink, "receiver", {source, *([] if other is None else [other])}, blocks)
            out, into = self._siblings[case.part]
            flows = [(source, other)] if other is not None else []
            roles = [out] if other is not None else []
            if another is not None:
                flows, roles = [*flows, (another, sink)], [*roles, into]
            if flows:
                self._compare([(int(a), int(b)) for a, b in flows], roles)

    def _blocks(self, part: Part) -> list[Part]:
        """Suspected uplinks that a path crosses."""
        (source,), (sink,) = part.senders, part.receivers
        return [other for other in self._suspected if other.kind == "uplink" and _passes(other, source, sink)]

    def _partner(self, host: int, kind: str, taken: set[int], within: Sequence[Part] = ()) -> int | None:
        """Someone free for the other end of a flow that passes no other suspected part, if there is such a one.

        within: uplinks that the flow shall pass instead of avoiding them.
        """
        free = [int(other) for other in self._session.rng.permutation(self._session.count)]
        free = [other for other in free if other != host and other not in taken]
        flows = {other: (host, other) if kind == "sender" else (other, host) for other in free}
        inside = [other for other in free if within and all(_passes(part, *flows[other]) for part in within)]
        clean = [other for other in free if not self._suspect(flows[other], except_host=host)]
        beyond = [other for other in free if other not in self._hosts]
        return next(iter([*inside, *clean, *beyond, *free]), None)

    def _suspect(self, flow: tuple[int, int], *, except_host: int | None = None, besides: Part | None = None) -> bool:
        """Whether a flow passes a part that was suspected, other than those of `except_host` and than `besides`."""
        return any(
            _passes(part, *flow)
            for part in self._suspected
            if part != besides and (part.kind in ("path", "uplink") or part.host != except_host)
        )

    def _compare(self, flows: Sequence[tuple[int, int]], roles: Sequence[_Case]) -> None:
        """One round of suspect flows and as many control flows as there are endpoints for."""
        controls = list(self._controls({end for flow in flows for end in flow}))
        rates = self._session.transfer(np.array([*flows, *controls]))
        logs = np.log(np.maximum(rates, 1.0))
        if controls:
            reference = float(np.median(logs[len(flows) :]))
        else:
            # Too few endpoints for a control beside it: what the screening found healthy.
            reference = float(np.percentile(self._session.seen.log_rates, 75))
        for log, case in zip(logs, roles):
            if case.state != "open":
                continue
            case.losses.append(reference - float(log))
            case.rates.append(float(np.exp(log)))
            case.controls.append(float(np.exp(reference)))

    def _controls(self, taken: set[int]) -> Iterable[tuple[int, int]]:
        """Disjoint flows that pass nothing suspected, between endpoints that are free and not suspected themselves."""
        free = [int(other) for other in self._session.rng.permutation(self._session.count)]
        free = [other for other in free if other not in taken and other not in self._hosts]
        while free:
            source = free.pop()
            sink = next((other for other in free if not self._suspect((source, other))), None)
            if sink is not None:
                free.remove(sink)
                yield source, sink

    def _uplink_rounds(self) -> None:
        """As many flows at once as the groups allow from one to the other, then as many within them."""
        for case in self._open_cases():
            if case.part.kind != "uplink":
                continue
            # Suspect hosts send as well, since an uplink may only show under full load, but do not count.
            crossing = self._matching(case.part)
            counted = [not self._suspect(flow, besides=case.part) for flow in crossing]
            if not any(counted):
                continue
            inside = list(self._controls(set()))
            logs = np.log(np.maximum(self._session.transfer(np.array(crossing)), 1.0))[counted]
            controls = np.log(np.maximum(self._session.transfer(np.array(inside)), 1.0)) if inside else None
            reference = np.percentile(self._session.seen.log_rates, 75) if controls is None else np.median(controls)
            case.losses.append(float(reference - logs.mean()))
            case.rates.append(float(np.exp(logs.mean())))
            case.controls.append(float(np.exp(reference)))

    def _matching(self, part: Part) -> list[tuple[int, int]]:
        """Senders and receivers of an uplink, paired at random."""
        sides = [self._session.rng.permutation(sorted(side)).tolist() for side in (part.senders, part.receivers)]
        return list(zip(*sides))


def _passes(part: Part, source: int, sink: int) -> bool:
    return source in part.senders and sink in part.receivers
