"""A fabric that answers like a measured one: flows share links fairly, and everything is noisy. Pure numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.fabric.probing import Endpoint, Figures, Flows, UnresponsiveError
from cluster.fabric.simulation.faults import Fault
from cluster.fabric.simulation.sharing import Shares, max_min_shares
from cluster.fabric.simulation.topology import Topology

_OVERHEAD_S = 5e-3
_GIVING_UP_S = 10.0
_DRIFT_STAYS = 0.8


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What makes two measurements of the same thing differ: standard deviations of logarithms, unless it says otherwise."""

    rate: float
    """Of a flow's rate."""
    unfairness: float
    """Of the rates of flows that share a full link, in addition: connections do not share evenly."""
    compute: float
    round_trip: float
    outliers: float
    """Probability that a measurement is far off: a flow at 50 to 90 % of its rate, compute 1.2 to 2 times as long, a round
    trip 2 to 10 times."""
    drift: float
    """Of all rates, or all times of compute, of a call together; one call resembles the one before."""
    unequal: float
    """Between endpoints that are all well: lasting."""


def draw_noise(rng: np.random.Generator, topology: Topology) -> Noise:
    """Quiet to noisy. Hosts that are namespaces of one machine drift together; machines of their own hardly do."""
    together = topology.name == "two-leaves"
    return Noise(
        rate=float(rng.uniform(0.02, 0.05)),
        unfairness=float(rng.uniform(0.02, 0.1)),
        compute=float(rng.uniform(0.01, 0.03)),
        round_trip=float(rng.uniform(0.05, 0.2)),
        outliers=float(rng.uniform(0.0, 0.02)),
        drift=float(rng.uniform(0.0, 0.05 if together else 0.01)),
        unequal=float(rng.uniform(0.0, 0.015)),
    )


class SimulatedFabric:
    """Implements `cluster.fabric.probing.Fabric`. The same arguments and the same questions give the same answers."""

    def __init__(
        self, topology: Topology, faults: Sequence[Fault], *, noise: Noise, seed: int, leaves_known: bool = True
    ) -> None:
        """`leaves_known`: whether endpoints tell the name of their leaf."""
        self._topology = topology
        self._faults = tuple(faults)
        self._noise = noise
        self._rng = np.random.default_rng(seed)
        self._endpoints = topology.endpoints() if leaves_known else _without_leaf(topology.endpoints())
        self._capacities = topology.capacities()
        self._lasting = np.exp(noise.unequal * self._rng.standard_normal((3, topology.num_endpoints)))
        self._drift = 0.0
        self._calls = 0
        self._seconds = 0.0

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """All of them."""
        return self._endpoints

    @property
    def seconds(self) -> float:
        """On the simulated clock: the slowest of each call's measurements, and 5 ms a call to start it."""
        return self._seconds

    @property
    def calls(self) -> int:
        """How many measurements were asked for, of whatever kind."""
        return self._calls

    def compute(self, who: Sequence[int], *, work_s: float) -> Figures:
        """Takes as long as the slowest: machines do not wait for one another. Raises UnresponsiveError."""
        number = np.asarray(who, dtype=np.intp)
        self._begin(number, "compute")
        seconds = work_s * self._lasting[2, number] * self._scatter(self._noise.compute, len(number))
        for fault in self._faults:
            seconds[number == fault.endpoint] /= fault.compute_keep
        seconds *= self._outliers(len(number), 1.2, 2.0)
        return self._done(seconds, float(seconds.max(initial=0.0)))

    def transfer(self, flows: Flows, *, num_bytes: int) -> Figures:
        """Max-min fair shares of the links, times noise; short transfers are measured less precisely.

        Raises UnresponsiveError.
        """
        flows = np.asarray(flows, dtype=np.intp).reshape(-1, 2)
        self._begin(flows, "transfer")
        shares = self._shares(flows)
        seconds = num_bytes / shares.rates
        ticks = self._topology.round_trip_s / seconds
        rates = shares.rates * self._lasting[0, flows[:, 0]] * self._lasting[1, flows[:, 1]]
        rates *= self._scatter(np.hypot(self._noise.rate, ticks), len(flows))
        rates *= np.where(shares.shared, self._scatter(self._noise.unfairness, len(flows)), 1.0)
        rates /= self._outliers(len(flows), 1 / 0.9, 1 / 0.5)
        return self._done(rates, float((num_bytes / rates).max(initial=0.0)), faster_is_more=True)

    def round_trip(self, pairs: Flows, *, repeats: int) -> Figures:
        """Base latency by levels crossed, and the queues that foreign traffic keeps, there and back.

        Raises UnresponsiveError.
        """
        pairs = np.asarray(pairs, dtype=np.intp).reshape(-1, 2)
        self._begin(pairs, "round trip")
        waits = np.zeros(self._topology.num_links + 1)
        for link in (link for fault in self._faults for link in fault.links):
            waits[link.link] += link.queue_round_trips * self._rng.uniform(0.3, 1.0)
        there, back = self._topology.routes(pairs), self._topology.routes(pairs[:, ::-1])
        levels = (there != self._topology.num_links).sum(1) / 4 + 0.5
        waiting = waits[there].sum(1) + waits[back].sum(1)
        seconds = self._topology.round_trip_s * (levels + waiting)
        seconds *= self._scatter(self._noise.round_trip / np.sqrt(max(repeats, 1)), len(pairs))
        seconds *= self._outliers(len(pairs), 2.0, 10.0, probability=self._noise.outliers / max(repeats, 1))
        return self._done(seconds, float(seconds.max(initial=0.0)) * repeats)

    def counters(self) -> Sequence[Mapping[str, float]]:
        """Simulated hosts have none."""
        return [{} for _ in self._endpoints]

    def _shares(self, flows: Flows) -> Shares:
        capacities = self._capacities.copy()
        for link in (link for fault in self._faults for link in fault.links):
            left = link.keep * np.exp(link.varies * self._rng.standard_normal())
            capacities[link.link] = min(left, 1.0) * self._needed(link.link)
        shares = max_min_shares(self._topology.routes(flows), capacities)
        rates = shares.rates
        for fault in self._faults:
            for sender, receiver in fault.pairs:
                bad = (flows[:, 0] == sender) & (flows[:, 1] == receiver)
                rates[bad] = np.minimum(rates[bad], fault.keep * self._topology.host_rate)
        return Shares(rates=rates, shared=shares.shared)

    def _needed(self, link: int) -> float:
        """What the own flows can ask of a link: all hosts of the leaf at once where it has a single cable."""
        topology = self._topology
        if link >= 4 * topology.num_endpoints and topology.spines == 1:
            return min(topology.cable_rate, topology.hosts_per_leaf * topology.host_rate)
        return float(self._capacities[link])

    def _begin(self, who: Flows, during: str) -> None:
        self._calls += 1
        asked = [number for number in self._dead() if (who == number).any()]
        if asked:
            self._seconds += _GIVING_UP_S
            raise UnresponsiveError([self._endpoints[number].rank for number in asked], during)
        step = np.sqrt(1 - _DRIFT_STAYS**2) * self._noise.drift * self._rng.standard_normal()
        self._drift = _DRIFT_STAYS * self._drift + step

    def _dead(self) -> list[int]:
        return [
            fault.endpoint
            for fault in self._faults
            if fault.endpoint is not None
            and fault.missing_from_call is not None
            and self._calls > fault.missing_from_call
        ]

    def _scatter(self, deviation: float | Figures, count: int) -> Figures:
        return np.exp(deviation * self._rng.standard_normal(count))

    def _outliers(self, count: int, low: float, high: float, probability: float | None = None) -> Figures:
        hit = self._rng.random(count) < (self._noise.outliers if probability is None else probability)
        return np.where(hit, self._rng.uniform(low, high, count), 1.0)

    def _done(self, figures: Figures, seconds: float, faster_is_more: bool = False) -> Figures:
        self._seconds += seconds + _OVERHEAD_S
        return figures * np.exp(-self._drift if faster_is_more else self._drift)


def _without_leaf(endpoints: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
    return tuple(
        Endpoint(rank=endpoint.rank, host=endpoint.host, machine=endpoint.machine, rail=endpoint.rail)
        for endpoint in endpoints
    )
