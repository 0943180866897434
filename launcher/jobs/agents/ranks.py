"""The ranks of an attempt as the supervisor orders them, and what the head tells it of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.failure_record import FailureRecord


@dataclass(frozen=True, kw_only=True)
class RanksPlan:
    """Ranks to start: `ranks_per_host` on each of `hosts`, in blocks, in their order."""

    hosts: Sequence[str]
    ranks_per_host: int
    command: Sequence[str]
    environ: Mapping[str, str]
    """Added to the agents' own."""
    directory: Path
    """The attempt's folder, logs/attempt-K: takes the ranks' logs and failure records."""
    working_directory: Path = field(default_factory=Path.cwd)
    """Where the ranks run."""
    max_log_bytes: int = 100_000_000
    """Largest log of one rank."""

    @property
    def num_ranks(self) -> int:
        """Over all hosts."""
        return len(self.hosts) * self.ranks_per_host


@dataclass(frozen=True, kw_only=True)
class RankEnded:
    """A rank has ended. Times are by this host's clock, as far as messages tell how the other one's differs."""

    rank: int
    host: str
    code: int
    """Exit code; negative: the signal that ended it. 127: its command could not be started, the record says why."""
    at: float
    """Seconds since 1970."""
    record: FailureRecord | None
    """What it has left of its failure."""
    last_line: str
    """The last line that it printed; empty where there is none."""
    ended_by_us: bool
    """Whether it ended only after `end_ranks` had asked it to."""


@dataclass(frozen=True, kw_only=True)
class HostLost:
    """An agent is gone: its ranks end by themselves. Where a host has several agents, each of them may be told."""

    host: str
    why: str
    silent: bool
    """Whether nothing was heard of it any more. Else its connection was ended, by it or by the head."""
    at: float
    """Seconds since 1970."""
    ranks: tuple[int, ...]
    """That had not ended. None where it ran none, such as a spare."""


@dataclass(frozen=True, kw_only=True)
class StopHeard:
    """Somebody else than the head has told an agent, and so its ranks, to stop."""

    host: str
