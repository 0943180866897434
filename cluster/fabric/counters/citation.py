"""Which counters speak for a finding, and which against it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from cluster.fabric.counters.meaning import READINGS, SIGNALS, Meaning, Signal
from cluster.fabric.findings import Kind

_CLEARLY_MORE = 2.0
"""How many times the others' median a count must reach to be cited beside them."""
_COUNTING_NOISE = 4.0
"""How many standard deviations of the others' median, as a count that comes by chance (Poisson), it must exceed it by."""


@dataclass(frozen=True, kw_only=True)
class Citation:
    """What a host's counters say of a finding about it: short sentences, each with its number."""

    supports: tuple[str, ...]
    contradicts: tuple[str, ...]

    def as_data(self) -> dict[str, list[str]]:
        """For a finding's evidence, under `counters`."""
        return {"supports": list(self.supports), "contradicts": list(self.contradicts)}


def cite(kind: Kind, growth: Mapping[str, float], *, others: Sequence[Mapping[str, float]] = ()) -> Citation:
    """What counters say of a finding of `kind`.

    growth: of the host that the finding names, over the measurement; of several hosts, the `mean` of theirs.
    others: of the hosts that it does not name, over the same time. With them a counter is cited only where it grew
        clearly more than on half of them: most counters grow on healthy hosts as well.
    """
    reading = READINGS[kind]
    supports: list[str] = []
    contradicts: list[str] = []
    for signal in SIGNALS:
        if signal.meaning in reading.supports | reading.contradicts and (said := _said(signal, growth, others)):
            (supports if signal.meaning in reading.supports else contradicts).append(said)
    if kind in ("slow_sender", "slow_receiver", "slow_link"):
        supports += _slow_ports(growth, others)
    contradicts += _silence(reading.expects, growth)
    return Citation(supports=tuple(supports), contradicts=tuple(contradicts))


def mean(growths: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of the growth on each of at least one host, so that hosts named together compare with others one by one."""
    names = dict.fromkeys(name for grown in growths for name in grown)
    return {name: sum(grown.get(name, 0.0) for grown in growths) / len(growths) for name in names}


def _said(signal: Signal, growth: Mapping[str, float], others: Sequence[Mapping[str, float]]) -> str | None:
    """One sentence on all counters of a signal together, or None where they do not tell."""
    grown = {name: amount for name, amount in growth.items() if amount > 0 and fnmatchcase(name, signal.pattern)}
    total = sum(grown.values())
    if not grown or (signal.only_beside_others and not others):
        return None
    beside = ""
    if others:
        usual = statistics.median(_total(signal, other) for other in others)
        if total < _CLEARLY_MORE * usual or total - usual < _COUNTING_NOISE * math.sqrt(usual):
            return None
        beside = f"; {_figure(usual)} on others"
    share = ""
    if signal.share_of:
        whole = growth.get(signal.share_of, 0.0)
        if total < signal.least_share * whole:
            return None
        share = f" of {_figure(whole)} {signal.share_of.rpartition('/')[2]}"
    amount = "" if signal.is_state else f" +{_figure(total)}{share}{beside}"
    return f"{_label(grown)}{amount}: {signal.says}"


def _silence(expected: frozenset[Meaning], growth: Mapping[str, float]) -> list[str]:
    """That counters which would have grown are there, and did not."""
    watched = [
        name
        for signal in SIGNALS
        if signal.meaning in expected and signal.silence_tells
        for name in growth
        if fnmatchcase(name, signal.pattern)
    ]
    heard = any(
        amount > 0 and fnmatchcase(name, signal.pattern)
        for signal in SIGNALS
        if signal.meaning in expected
        for name, amount in growth.items()
    )
    if not watched or heard:
        return []
    counters = ", ".join(dict.fromkeys(name.rpartition("/")[2] for name in watched))
    return [f"{counters} did not grow"]


def _slow_ports(growth: Mapping[str, float], others: Sequence[Mapping[str, float]]) -> list[str]:
    """Ports that agreed with their switch on a lower rate than the same port of most others.

    Only the proportion is told: whoever adds up growth over a while has added rates up, too, on all hosts alike.
    """
    said = []
    for name in (name for name in growth if name.endswith("/rate_bytes_per_s")):
        rates = [other[name] for other in others if name in other]
        if rates and growth[name] < 0.99 * (usual := statistics.median(rates)):
            said.append(
                f"{name.split('/')[1]} runs at {100 * growth[name] / usual:.0f} % of the rate that it has on others"
            )
    return said


def _total(signal: Signal, growth: Mapping[str, float]) -> float:
    return sum(amount for name, amount in growth.items() if fnmatchcase(name, signal.pattern))


def _label(names: Mapping[str, float]) -> str:
    """`port_xmit_wait of mlx5_0:1, mlx5_1:1`, `hw_slowdown of gpu 3`; the device `host` goes without saying."""
    counters = dict.fromkeys(name.rpartition("/")[2] for name in names)
    devices: dict[str, None] = {}
    for name in names:
        area, device, _ = name.split("/")
        if device != "host":
            devices[f"{area} {device}" if area in ("gpu", "nvlink", "cgroup") else device] = None
    return ", ".join(counters) + (f" of {', '.join(devices)}" if devices else "")


def _figure(number: float) -> str:
    """`12,345` for a count, `3.21` for what is measured."""
    return f"{number:,.0f}" if number == int(number) else f"{number:,.3g}" if abs(number) < 1000 else f"{number:,.0f}"
