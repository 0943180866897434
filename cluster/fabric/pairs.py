"""Every pair of endpoints measured both ways. Imports without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.fabric.probing import Fabric, Figures
from cluster.fabric.schedule import both_ways, circle_rounds


@dataclass(frozen=True, kw_only=True)
class PairMatrix:
    """What each sent to each."""

    names: tuple[str, ...]
    bytes_per_s: Figures
    """(n, n): a row sends to a column; NaN on the diagonal."""
    rounds: int
    seconds: float

    @property
    def median_bytes_per_s(self) -> float:
        """Over all pairs and directions."""
        return float(np.nanmedian(self.bytes_per_s))

    def as_data(self) -> dict[str, Any]:
        """For JSON: `hosts`, `pairs_bytes_per_s` with null where nothing was measured, `rounds`, `seconds`."""
        rows = [[None if math.isnan(rate) else rate for rate in row] for row in self.bytes_per_s.tolist()]
        return {
            "hosts": list(self.names),
            "pairs_bytes_per_s": rows,
            "median_bytes_per_s": self.median_bytes_per_s,
            "rounds": self.rounds,
            "seconds": self.seconds,
        }


def measure_pairs(fabric: Fabric, *, num_bytes: int, repeats: int) -> PairMatrix:
    """`repeats` times over the circle schedule: n - 1 rounds of disjoint pairs, both directions of a pair at once.

    Raises UnresponsiveError or StalledError.
    """
    started = fabric.seconds
    count = len(fabric.endpoints)
    rates = np.full((repeats, count, count), np.nan)
    schedule = circle_rounds(count)
    for repeat in range(repeats):
        for pairs in schedule:
            flows = both_ways(pairs)
            rates[repeat, flows[:, 0], flows[:, 1]] = fabric.transfer(flows, num_bytes=num_bytes)
    hosts = [endpoint.host for endpoint in fabric.endpoints]
    return PairMatrix(
        names=tuple(
            endpoint.host if hosts.count(endpoint.host) == 1 else f"{endpoint.host}:{endpoint.rail}"
            for endpoint in fabric.endpoints
        ),
        bytes_per_s=np.median(rates, axis=0),
        rounds=repeats * len(schedule),
        seconds=fabric.seconds - started,
    )
