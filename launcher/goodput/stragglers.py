"""What the slowest rank costs each step, by the windows of the fabric monitor (`fabric/windows.jsonl`).

A low estimate: the latest rank must be the same in several windows in a row, and only what it is later than the second
latest counts; where ranks tell how long they work, no more than what it works longer than all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.goodput.account import microseconds

PERSISTENCE = 3
"""Windows in a row, as the monitor's own findings need them: noise makes some rank the latest in each window."""
LEAST_SHARE = 0.02
"""Of a step, below which nothing is said to be a straggler's."""


@dataclass(frozen=True, kw_only=True)
class StragglerCost:
    """Steps in which the others waited for one rank."""

    first_step: int
    last_step: int
    rank: int
    cost_us: int
    """Microseconds of each step."""


@dataclass(frozen=True, kw_only=True)
class _Latest:
    first_step: int
    last_step: int
    rank: int
    cost_us: int
    is_notable: bool


def straggler_costs(windows: Iterable[Mapping[str, Any]]) -> list[StragglerCost]:
    """By step, ascending. `windows` in the order of the file; of steps that were made again, what was seen last counts."""
    kept: list[_Latest] = []
    for window in windows:
        seen = _latest(window)
        if seen is None:
            continue
        while kept and kept[-1].last_step >= seen.first_step:
            kept.pop()
        kept.append(seen)
    costs: list[StragglerCost] = []
    run: list[_Latest] = []
    for seen in [*kept, None]:
        if seen is not None and seen.is_notable and (not run or run[-1].rank == seen.rank):
            run.append(seen)
            continue
        if len(run) >= PERSISTENCE:
            costs += [_cost(each) for each in run]
        run = [seen] if seen is not None and seen.is_notable else []
    return costs


class CostOfStep:
    """Looks the cost up, for steps that are asked for in ascending order."""

    def __init__(self, costs: Iterable[StragglerCost]) -> None:
        self._costs = list(costs)
        self._place = 0

    def __call__(self, step: int) -> int:
        """Microseconds that a straggler costs this step."""
        while self._place < len(self._costs) and self._costs[self._place].last_step < step:
            self._place += 1
        if self._place < len(self._costs) and self._costs[self._place].first_step <= step:
            return self._costs[self._place].cost_us
        return 0


def _cost(seen: _Latest) -> StragglerCost:
    return StragglerCost(first_step=seen.first_step, last_step=seen.last_step, rank=seen.rank, cost_us=seen.cost_us)


def _latest(window: Mapping[str, Any]) -> _Latest | None:
    """None for a line that is damaged, or tells of fewer than two ranks."""
    try:
        first, last, step_s = int(window["first_step"]), int(window["step"]), float(window["step_s"])
        late = sorted(((float(seconds), int(rank)) for rank, seconds in window["late_s"].items()), reverse=True)
        busy = {int(rank): float(seconds) for rank, seconds in window.get("busy_s", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    if len(late) < 2 or last < first:
        return None
    rank = late[0][1]
    cost = late[0][0] - late[1][0]
    if rank in busy and len(busy) > 1:
        cost = min(cost, busy[rank] - max(seconds for other, seconds in busy.items() if other != rank))
    return _Latest(
        first_step=first,
        last_step=last,
        rank=rank,
        cost_us=max(0, microseconds(cost)),
        is_notable=cost > 0 and cost >= LEAST_SHARE * step_s,
    )
