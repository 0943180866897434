"""All transfers of a diagnosis in the order in which they ran. Pure numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cluster.fabric.probing import Figures, Flows
from cluster.fabric.statistics import noise_from_repeats

LEAST_NOISE = 0.01
"""Physics: no measurement on a network repeats better than this, whatever a few repeats say."""


class Observations:
    """Rates of flows with the round that each was part of."""

    def __init__(self, num_endpoints: int) -> None:
        self.num_endpoints = num_endpoints
        self._flows: list[Flows] = []
        self._logs: list[Figures] = []
        self._rounds: list[NDArray[np.intp]] = []

    def add(self, flows: Flows, bytes_per_s: Figures) -> None:
        """One round's flows, (F, 2), and their rates, (F,)."""
        self._flows.append(np.asarray(flows, dtype=np.intp))
        # A rate of zero (nothing came in time) is very slow, not minus infinity.
        self._logs.append(np.log(np.maximum(bytes_per_s, 1.0)))
        self._rounds.append(np.full(len(flows), len(self._rounds), dtype=np.intp))

    def __len__(self) -> int:
        return sum(len(flows) for flows in self._flows)

    @property
    def flows(self) -> Flows:
        """(K, 2): sender and receiver of each observation."""
        return np.concatenate([np.zeros((0, 2), dtype=np.intp), *self._flows])

    @property
    def log_rates(self) -> Figures:
        """(K,): natural logarithm of bytes a second."""
        return np.concatenate([np.zeros(0), *self._logs])

    @property
    def rounds(self) -> NDArray[np.intp]:
        """(K,): which round each was in, from 0."""
        return np.concatenate([np.zeros(0, dtype=np.intp), *self._rounds])

    def noise(self) -> float:
        """Standard deviation of one logarithm of a rate, from repeats of the same flow; at least LEAST_NOISE."""
        flows = self.flows
        spread = noise_from_repeats(self.log_rates, flows[:, 0] * self.num_endpoints + flows[:, 1])
        return LEAST_NOISE if np.isnan(spread) else max(spread, LEAST_NOISE)

    def matrix(self) -> Figures:
        """(n, n) bytes a second from row to column: the median of each flow's rates, nan where none was measured."""
        rates = np.full((self.num_endpoints, self.num_endpoints), np.nan)
        flows, logs = self.flows, self.log_rates
        keys = flows[:, 0] * self.num_endpoints + flows[:, 1]
        for key in np.unique(keys):
            rates[divmod(int(key), self.num_endpoints)] = float(np.exp(np.median(logs[keys == key])))
        return rates
