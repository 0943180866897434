"""What a run tells its watch, and what may be plugged into it. Imports without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cluster.fabric.findings import Finding


@dataclass(frozen=True, kw_only=True)
class AnalyserSpec:
    """An analyser for the head, which is a process of its own: so it is named, not given."""

    factory: str
    """`module:function`, importable without torch; called as `function(context: HeadContext) -> HeadAnalyser`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Plain data for JSON; the analyser finds it in its context."""


@dataclass(frozen=True, kw_only=True)
class HeadContext:
    """What an analyser at the head has to work with."""

    directory: Path
    """The run's directory."""
    world_size: int
    options: Mapping[str, Any]
    """Of its `AnalyserSpec`."""
    host_of: Callable[[int], str]
    """The host of a rank; "rank N" for one that has not said so yet."""
    event: Callable[[str, Mapping[str, Any]], None]
    """Appends a line to the run's events.jsonl: its name and its details."""


class HeadAnalyser(Protocol):
    """Lives at the head. All its methods are called from one thread; `now` is in seconds, of a clock that never jumps.

    What it raises ends this analyser alone, and stands in events.jsonl.
    """

    def on_message(self, rank: int, kind: str, payload: Mapping[str, Any], now: float) -> None:
        """What a rank sent by `Watch.send(kind, payload)`, whatever the kind."""

    def tick(self, now: float) -> Sequence[Finding]:
        """Called about once a second. A finding is told once: return it when it is new."""

    def close(self) -> None:
        """The run is over, or the head is about to end."""


@dataclass(frozen=True, kw_only=True)
class WatchSetup:
    """One rank's part of a watch. Apart from `rank`, `local_rank`, `host` and `exchange`, rank 0's values count for all."""

    directory: Path
    """The run's directory: `events.jsonl`, `fabric/` and `stacks/` are written there."""
    rank: int
    world_size: int
    local_rank: int
    """Local rank 0 starts the watcher of its host."""
    host: str
    """This rank's host by name: the same for all ranks of one host, another for each other host."""
    address: str
    """Rank 0's host as the others reach it (MASTER_ADDR): a name or an IP address."""
    exchange: Callable[[str | None], str]
    """A broadcast from rank 0: it gives a string, the others None, and all get rank 0's. Called exactly once by each rank."""
    hang_seconds: float = 8.0
    """Seconds for which a rank may be missing from a collective before it is named."""
    analysers: tuple[AnalyserSpec, ...] = ()
    """To be plugged into the head; rank 0's count."""
