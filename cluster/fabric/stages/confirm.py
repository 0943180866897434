"""Confirms suspicions by fresh comparisons: the suspect's flows, one way at a time, beside flows that nobody suspects.

A comparison is a difference of logarithms within one round, so that what happens to the whole fabric or machine cancels. Flows
run one way only: a slow sender's queue also delays the acknowledgements of what it receives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..analysis.explain import Part, receiver, sender, uplink
from ..statistics import Contrast, contrast, student_tail
from .session import Session

_LEAST_REPEATS, _MOST_REPEATS = 4, 14
_MOST_SUSPECT_HOSTS = 6


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

    def __init__(self, session: Session, suspected: Sequence[Part]) -> None:
        self._session = session
        self._noise = session.seen.noise()
        self._suspected = list(suspected)
        count = session.count
        hosts = [part.host for part in suspected if part.kind in ("sender", "receiver")][:_MOST_SUSPECT_HOSTS]
        self._hosts = list(dict.fromkeys(hosts))
        self._cases: dict[Part, _Case] = {}
        for host in self._hosts:
            self._open(sender(host, count), receiver(host, count))
        for part in suspected:
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

    def run(self) -> list[Confirmed]:
        """Repeats until each case is decided, or time or patience is spent."""
        self._session.during = "the comparison of suspects"
        for repeat in range(_MOST_REPEATS):
            self._host_rounds("sender")
            self._host_rounds("receiver")
            self._path_rounds()
            self._uplink_rounds()
            if repeat + 1 >= _LEAST_REPEATS:
                self._decide()
                if not self._open_cases() or not self._session.in_time:
                    break
        self._session.read_counters()
        return [self._confirmed(case) for case in self._cases.values() if case.state == "slow"]

    def spoilt_paths(self) -> list[Part]:
        """Senders and receivers that were slow in more than the one path that was suspected."""
        return [
            case.part
            for siblings in self._siblings.values()
            for case in siblings
            if self._loss(case).mean > 0.5 * self._session.settings.least_log_loss
            and self._loss(case).tail_beyond(0.0) < 0.01
        ]

    def _open_cases(self) -> list[_Case]:
        return [case for case in self._cases.values() if case.state == "open"]

    def _loss(self, case: _Case) -> Contrast:
        return contrast(case.losses, known_spread=1.2 * self._noise, known_dof=6)

    def _decide(self) -> None:
        settings = self._session.settings
        least = settings.least_log_loss
        for case in self._open_cases():
            loss = self._loss(case)
            if loss.count < _LEAST_REPEATS:
                continue
            tail = self._tail(case)
            if loss.mean >= 0.9 * least and tail < settings.false_alarm_rate / len(self._cases):
                case.state = "slow"
            elif student_tail((least - loss.mean) / loss.standard_error, loss.dof) < 0.02:
                case.state = "well"

    def _tail(self, case: _Case) -> float:
        """Of the part's own loss; of a path also that it is slower than its ends are elsewhere."""
        least = self._session.settings.least_log_loss
        tail = self._loss(case).tail_beyond(0.4 * least)
        for sibling in self._siblings.get(case.part, ()):
            paired = np.array(case.losses[: len(sibling.losses)]) - sibling.losses[: len(case.losses)]
            more = contrast(paired, known_spread=1.7 * self._noise, known_dof=6)
            tail = max(tail, more.tail_beyond(0.3 * least))
        return tail

    def _confirmed(self, case: _Case) -> Confirmed:
        return Confirmed(
            part=case.part,
            loss=self._loss(case),
            tail=self._tail(case),
            bytes_per_s=float(np.median(case.rates)),
            control_bytes_per_s=float(np.median(case.controls)),
        )

    def _host_rounds(self, kind: str) -> None:
        """Each suspect host with a partner, in as few rounds as it takes, beside control flows."""
        cases = {case.part.host: case for case in self._open_cases() if case.part.kind == kind}
        waiting = [int(host) for host in self._session.rng.permutation(list(cases))] if cases else []
        while waiting:
            flows: list[tuple[int, int]] = []
            roles: list[_Case] = []
            for host in list(waiting):
                partner = self._partner(host, kind, {end for flow in flows for end in flow} | set(waiting))
                if partner is None and flows:
                    continue
                if partner is None:
                    partner = next(other for other in range(self._session.count) if other != host)
                flows.append((host, partner) if kind == "sender" else (partner, host))
                roles.append(cases[host])
                waiting.remove(host)
            self._compare(flows, roles)

    def _path_rounds(self) -> None:
        """Each suspect path; then, at once, its sender to another and another to its receiver."""
        for case in self._open_cases():
            if case.part.kind != "path":
                continue
            (source,), (sink,) = case.part.senders, case.part.receivers
            self._compare([(source, sink)], [case])
            other = self._partner(source, "sender", {sink})
            another = self._partner(sink, "receiver", {source, *([] if other is None else [other])})
            out, into = self._siblings[case.part]
            flows = [(source, other)] if other is not None else []
            roles = [out] if other is not None else []
            if another is not None:
                flows, roles = [*flows, (another, sink)], [*roles, into]
            if flows:
                self._compare([(int(a), int(b)) for a, b in flows], roles)

    def _partner(self, host: int, kind: str, taken: set[int]) -> int | None:
        """Someone free for the other end of a flow that passes no other suspected part, if there is such a one."""
        free = [int(other) for other in self._session.rng.permutation(self._session.count)]
        free = [other for other in free if other != host and other not in taken]
        clean = [
            other
            for other in free
            if not self._suspect((host, other) if kind == "sender" else (other, host), except_host=host)
        ]
        beyond = [other for other in free if other not in self._hosts]
        return next(iter([*clean, *beyond, *free]), None)

    def _suspect(self, flow: tuple[int, int], *, except_host: int | None = None, besides: Part | None = None) -> bool:
        """Whether a flow passes a part that was suspected, other than those of `except_host` and than `besides`."""
        return any(
            part.passed_by(np.array([flow]))[0]
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
