"""Time that is spent on one thing at a time: each microsecond is counted once, so that the parts make up the whole exactly."""

from __future__ import annotations

import math
from typing import Any, Literal

Category = Literal[
    "queued",
    "launching",
    "preflight",
    "building",
    "first_step",
    "steps",
    "data",
    "stragglers",
    "saving",
    "validation",
    "lost",
    "restarts",
    "stopped",
    "finishing",
    "other",
]

CATEGORIES: dict[Category, str] = {
    "steps": "steps that count",
    "stragglers": "waiting for the slowest rank",
    "data": "waiting for data",
    "saving": "saving, while the steps stood still",
    "validation": "validation",
    "lost": "steps that were lost with a failure, and made again",
    "restarts": "from a failure to the next attempt",
    "launching": "starting: processes on hosts",
    "preflight": "starting: preflight",
    "building": "starting: imports, data, model, checkpoint",
    "first_step": "starting: what the first step took longer, as compiling does",
    "queued": "waiting in the queue",
    "stopped": "stopped, between two starts",
    "finishing": "export and samples after the last step",
    "other": "between steps, and not yet told of",
}
"""Every category with what it is, in the order in which they are shown."""
STARTING: tuple[Category, ...] = ("launching", "preflight", "building", "first_step")
"""Those that together are the start of an attempt."""


def microseconds(seconds: Any) -> int:
    """Whole microseconds; 0 for what is no number, as damaged records may hold."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return 0
    return round(seconds * 1e6)


class Account:
    """The time since `begin`, in microseconds since 1970, up to where it has been told."""

    def __init__(self, begin: int) -> None:
        self.begin = begin
        self.now = begin
        """Up to here everything is accounted for."""
        self.spent: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)

    def until(self, moment: int, category: Category) -> None:
        """The time up to `moment` was spent on `category`; none where that is past already, as clocks differ."""
        self.take(moment - self.now, category)

    def take(self, span: int, category: Category) -> None:
        """The next `span` of time was spent on `category`."""
        if span > 0:
            self.spent[category] += span
            self.now += span

    def move(self, span: int, source: Category, target: Category) -> None:
        """Part of what was put under one category belongs to another."""
        span = max(0, min(span, self.spent[source]))
        self.spent[source] -= span
        self.spent[target] += span
