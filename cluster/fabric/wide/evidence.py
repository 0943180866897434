"""What was seen of each sender and receiver, round by round. Pure numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cluster.fabric.probing import Figures, Flows

_FLOOR = -1.0
"""Statistics: logarithms of rates below this count as this: an outlier must not stand for many measurements."""


class Ends:
    """Logarithms of rates, relative to what a healthy flow gets: (rounds, n) as sender, and as receiver."""

    def __init__(self, count: int) -> None:
        self._rows: tuple[list[Figures], list[Figures]] = ([], [])
        self._count = count

    def add(self, flows: Flows, logs: Figures) -> None:
        """One round, in which no endpoint sends or receives twice."""
        for side in (0, 1):
            row = np.full(self._count, np.nan)
            row[flows[:, side]] = np.maximum(logs, _FLOOR)
            self._rows[side].append(row)

    def means(self, side: int, since: int = 0) -> Figures:
        """(n,) over rounds from `since` on, of senders (`side` 0) or receivers (1); nan where nothing was seen."""
        rows = np.array(self._rows[side][since:]).reshape(-1, self._count)
        seen = np.isfinite(rows)
        with np.errstate(invalid="ignore"):
            return np.where(seen, rows, 0.0).sum(axis=0) / seen.sum(axis=0)

    def best(self, side: int, *, rank: int = 1) -> Figures:
        """(n,) the highest over rounds, or the one of that rank; minus infinity where so much was not seen."""
        rows = np.array(self._rows[side]).reshape(-1, self._count)
        if len(rows) < rank:
            return np.full(self._count, -np.inf)
        return np.sort(np.where(np.isfinite(rows), rows, -np.inf), axis=0)[-rank]

    def samples(self, side: int, endpoint: int, since: int = 0) -> Figures:
        """What was seen of one."""
        column = np.array([row[endpoint] for row in self._rows[side][since:]])
        return column[np.isfinite(column)]

    def seen(self, side: int) -> NDArray[np.intp]:
        """(n,) in how many rounds."""
        return np.isfinite(np.array(self._rows[side]).reshape(-1, self._count)).sum(axis=0)
