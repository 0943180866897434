"""A fabric with a memory: what was asked, what came back, how many rounds it took, how counters grew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cluster.fabric.analysis.observations import Observations
from cluster.fabric.probing import Endpoint, Fabric, Figures, Flows
from cluster.fabric.settings import DiagnosisSettings


class Session:
    """One diagnosis's access to its fabric. Every question but that for counters is a round."""

    def __init__(self, fabric: Fabric, settings: DiagnosisSettings) -> None:
        self.fabric = fabric
        self.settings = settings
        self.endpoints: tuple[Endpoint, ...] = fabric.endpoints
        self.count = len(self.endpoints)
        self.rng = np.random.default_rng(settings.seed)
        self.rounds = 0
        self.num_bytes = settings.least_bytes
        self.seen = Observations(self.count)
        """Of the screening: all pairs, both ways."""
        self.compute_s: Figures | None = None
        """(n,) of each endpoint, once known."""
        self.alpha_s: float | None = None
        """Seconds to start a message between two endpoints, once known."""
        self.beta_s_per_byte: float | None = None
        """Seconds a byte between two endpoints, where a survey of few of all pairs has found it."""
        self.during = "the start"
        self._growth: list[dict[str, float]] = [{} for _ in self.endpoints]

    def in_time(self, share: float = 1.0) -> bool:
        """Whether there is time for more repeats, if they may use this share of it."""
        return self.fabric.seconds < share * self.settings.most_seconds

    def transfer(self, flows: Flows) -> Figures:
        """(F,) bytes a second of flows that run at once, at the size that `calibrate` chose."""
        self.rounds += 1
        return self.fabric.transfer(np.asarray(flows, dtype=np.intp).reshape(-1, 2), num_bytes=self.num_bytes)

    def compute(self, who: Sequence[int], *, work_s: float) -> Figures:
        """(len(who),) seconds for one piece of work."""
        self.rounds += 1
        return self.fabric.compute(who, work_s=work_s)

    def round_trip(self, pairs: Flows, *, repeats: int = 5) -> Figures:
        """(F,) seconds there and back."""
        self.rounds += 1
        return self.fabric.round_trip(np.asarray(pairs, dtype=np.intp).reshape(-1, 2), repeats=repeats)

    def time_start_up(self, pairs: Flows) -> None:
        """Half a round trip of a small message, by the median of `pairs`: one round."""
        self.alpha_s = 0.5 * float(np.median(self.round_trip(pairs)))

    def calibrate(self, flows: Flows) -> None:
        """Chooses the size of transfers from the rate of a first, small one."""
        settings = self.settings
        rate = float(np.median(self.transfer(flows)))
        wanted = int(rate * settings.transfer_s)
        self.num_bytes = min(max(wanted, settings.least_bytes), settings.most_bytes)

    def read_counters(self) -> None:
        """Adds by how much counters grew since the last call."""
        for grown, more in zip(self._growth, self.fabric.counters()):
            for name, value in more.items():
                grown[name] = grown.get(name, 0.0) + value

    def restart_counters(self) -> None:
        """Growth is counted from here on."""
        self.fabric.counters()

    @property
    def growth(self) -> Sequence[Mapping[str, float]]:
        """For each endpoint, by how much each counter grew over all that was read."""
        return self._growth
