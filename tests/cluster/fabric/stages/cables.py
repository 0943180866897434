"""A fabric of two groups of hosts and the cables between them, each with what is left for our own flows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cluster.fabric.analysis.explain import Part, uplink
from cluster.fabric.probing import Endpoint, Figures, Flows
from cluster.fabric.settings import DiagnosisSettings
from cluster.fabric.stages.confirm import Confirmed
from cluster.fabric.stages.session import Session
from cluster.fabric.statistics import contrast

HOST_RATE = 6e6


class Cables:
    """Flows of the senders of a cable share its capacity alike; a host's link bounds each. The noise is 2 %."""

    def __init__(self, cables: Mapping[frozenset[int], float], *, hosts: int = 8, transfer_s: float = 0.1) -> None:
        """cables: for each set of senders what they can send together, and at most that for one of them alone."""
        self.endpoints = tuple(
            Endpoint(rank=number, host=f"h{number}", machine=f"m{number}") for number in range(hosts)
        )
        self.seconds = 0.0
        self.asked: list[list[tuple[int, int]]] = []
        self._cables = cables
        self._transfer_s = transfer_s
        self._rng = np.random.default_rng(5)

    def transfer(self, flows: Flows, *, num_bytes: int) -> Figures:
        self.seconds += self._transfer_s
        self.asked.append([(int(a), int(b)) for a, b in flows])
        rates = np.full(len(flows), HOST_RATE)
        for senders, capacity in self._cables.items():
            sharing = np.isin(flows[:, 0], list(senders))
            rates[sharing] = np.minimum(HOST_RATE, capacity / max(int(sharing.sum()), 1))
        return rates * np.exp(0.02 * self._rng.standard_normal(len(flows)))

    def round_trip(self, pairs: Flows, *, repeats: int) -> Figures:
        self.seconds += self._transfer_s
        self.asked.append([(int(a), int(b)) for a, b in pairs])
        return np.full(len(pairs), 1e-3)

    def compute(self, who: Sequence[int], *, work_s: float) -> Figures:
        return np.full(len(who), work_s)

    def counters(self) -> Sequence[Mapping[str, float]]:
        return [{} for _ in self.endpoints]


def halves(hosts: int) -> Part:
    """The uplink from the first half of the hosts to the second."""
    return uplink(frozenset(range(hosts // 2)), frozenset(range(hosts // 2, hosts)))


def congested(fabric: Cables, *, seed: int = 0) -> tuple[Session, Confirmed]:
    """A diagnosis that has found the uplink between the halves to be slow."""
    session = Session(fabric, DiagnosisSettings(seed=seed))
    part = halves(session.count)
    item = Confirmed(part=part, loss=contrast([0.7, 0.7]), tail=1e-9, bytes_per_s=3e6, control_bytes_per_s=HOST_RATE)
    return session, item
