"""Which steps are watched: so few that watching stays cheap, and the same ones on every rank without asking anybody."""

from __future__ import annotations

import math
from collections import deque
from statistics import median_high, median_low

COST_SHARE = 0.0025
"""Of a step's time: what watching may cost, averaged over all steps."""
_FIRST = 4
_MOST = 512
_REMEMBERED = 5


class Cadence:
    """Each `every`-th step is due; `every` is a power of two, so whatever ranks choose, the steps of the one that watches
    least are watched by all.

    `least_s`: seconds between two watched steps, at least, so that the messages of many ranks do not swamp their reader.
    """

    def __init__(self, *, least_s: float) -> None:
        self.every = _FIRST
        self._least_s = least_s
        self._costs: deque[float] = deque(maxlen=_REMEMBERED)
        self._steps: deque[float] = deque(maxlen=_REMEMBERED)

    def due(self, step: int) -> bool:
        """Whether to watch this step."""
        return step % self.every == 0

    def learn(self, *, cost_s: float, step_s: float) -> None:
        """What watching a step has cost, and how long it took: more steps are left out soon, fewer only by and by."""
        self._costs.append(cost_s)
        self._steps.append(step_s)
        # Medians: one moment without a processor must not put the next look off for hundreds of steps.
        wanted = max(median_low(self._costs) / COST_SHARE, self._least_s) / max(median_high(self._steps), 1e-6)
        power = 2 ** max(0, math.ceil(math.log2(wanted))) if wanted > 0 else 1
        if power > self.every:
            self.every = min(power, 4 * self.every, _MOST)
        elif power <= self.every // 2 and wanted < 0.4 * self.every:  # not back and forth at the border
            self.every //= 2
