"""One rank's part of the monitor: which steps it watches, and what it tells of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from cluster.fabric.monitor.cadence import Cadence
from cluster.fabric.monitor.durations import RankLists, Record, StepDurations, TappedStep, group_durations
from cluster.fabric.monitor.rank_messages import DURATIONS

_LEAST_SECONDS = 0.2
_RANKS_PER_SECOND = 2000
"""Messages that the head reads in a second without trouble."""

Members = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name of a process group -> its axis and its world ranks."""


class DurationSource(Protocol):
    """What times the collectives of one step."""

    knows_waits: bool
    """Whether `Record.waited_s` means anything."""

    def start(self) -> None:
        """The step begins."""
        ...

    def stop(self) -> TappedStep:
        """The step is over."""
        ...


class RankMonitor:
    """Around each step: `begin` before it, `end` after it, `tell` once its time is known. Nothing here waits for anybody.

    `send` gives a message to the head. `members` is asked in each watched step, since groups are made as a run goes.
    `quiet` is asked before a step is watched: False where another thread may be issuing collectives just then.
    """

    def __init__(
        self,
        source: DurationSource,
        *,
        send: Callable[[str, Mapping[str, Any]], bool],
        members: Callable[[], Members],
        quiet: Callable[[], bool],
        role: str,
        world_size: int,
    ) -> None:
        self._source = source
        self._send = send
        self._members = members
        self._quiet = quiet
        self._role = role
        self._cadence = Cadence(least_s=max(_LEAST_SECONDS, world_size / _RANKS_PER_SECOND))
        self._lists = RankLists()
        self._watching = False
        self._seen: tuple[int, TappedStep] | None = None

    def begin(self, step: int) -> None:
        """Step `step` begins."""
        if self._cadence.due(step) and self._quiet():
            self._watching = True
            self._source.start()

    def end(self, step: int) -> None:
        """It is over, by exception or not."""
        if self._watching:
            self._watching = False
            self._seen = step, self._source.stop()

    def abandon(self) -> None:
        """Nothing is watched any more, and nothing left in the way: after a method has raised."""
        self._seen = None
        if self._watching:
            self._watching = False
            self._source.stop()

    def tell(self, step: int, step_s: float) -> None:
        """Sends what was seen of step `step`, if it was watched, which took `step_s` seconds with its data."""
        if self._seen is None or self._seen[0] != step:
            return
        tapped = self._seen[1]
        self._seen = None
        every = self._cadence.every
        self._cadence.learn(cost_s=tapped.cost_s, step_s=step_s)
        waited_s = sum(record.waited_s for record in tapped.records)
        members = self._members()
        by_group: dict[str, list[Record]] = {}
        for record in tapped.records:
            by_group.setdefault(record.group, []).append(record)
        told = StepDurations(
            step=step,
            role=self._role,
            step_s=step_s,
            busy_s=max(0.0, step_s - waited_s) if self._source.knows_waits else None,
            every=every,
            cost_s=tapped.cost_s,
            groups=tuple(
                group_durations(*members[name], records)
                for name, records in by_group.items()
                if name in members and len(members[name][1]) > 1
            ),
        )
        self._send(DURATIONS, told.as_payload(self._lists))
