"""Which steps are watched: so few that watching stays cheap, and the same ones on every rank without asking anybody."""

from __future__ import annotations

import math

COST_SHARE = 0.0025
"""Of a step's time: what watching may cost, averaged over all steps."""
_FIRST = 4
_MOST = 512
_SMOOTHING = 0.3


class Cadence:
    """Each `every`-th step is due; `every` is a power of two, so whatever ranks choose, the steps of the one that watches
    least are watched by all.

    `least_s`: seconds between two watched steps, at least, so that the messages of many ranks do not swamp their reader.
    """

    def __init__(self, *, least_s: float) -> None:
        self.every = _FIRST
        self._least_s = least_s
        self._cost_s: float | None = None
        self._step_s: float | None = None

    def due(self, step: int) -> bool:
        """Whether to watch this step."""
        return step % self.every == 0

    def learn(self, *, cost_s: float, step_s: float) -> None:
        """What watching a step has cost, and how long it took: more steps are left out at once, fewer only by and by."""
        self._cost_s = _smoothed(self._cost_s, cost_s)
        self._step_s = _smoothed(self._step_s, step_s)
        wanted = max(self._cost_s / COST_SHARE, self._least_s) / max(self._step_s, 1e-6)
        power = 2 ** max(0, math.ceil(math.log2(wanted))) if wanted > 0 else 1
        if power > self.every:
            self.every = min(power, _MOST)
        elif power <= self.every // 2 and wanted < 0.4 * self.every:  # not back and forth at the border
            self.every //= 2


def _smoothed(before: float | None, value: float) -> float:
    return value if before is None else before + _SMOOTHING * (value - before)
