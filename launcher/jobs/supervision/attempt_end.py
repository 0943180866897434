"""How an attempt ended, and, where it failed, its first cause: not the hundred failures that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

FailureKind = Literal["exception", "signal", "exit", "hang", "host_lost", "never_came", "preflight", "starter"]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The first cause."""

    kind: FailureKind
    message: str
    """One line for the user: who, where, what, and when."""
    at: float | None = None
    """Seconds since 1970: when the rank, the host or their starter ended; a host that fell silent, when it was heard last;
    in a hang, when ranks began to wait. None where nothing did."""
    has_begun: bool = True
    """Whether anything was started."""
    exit_code: int = 1
    """That the job would end with."""
    rank: int | None = None
    host: str | None = None
    last_collective: str | None = None
    """Where the rank was seen last, by the watch of the run."""
    step: int | None = None
    """The last one that the run has recorded in this attempt."""
    traceback: str = ""
    log: Path | None = None
    """Of the rank."""
    lost_hosts: tuple[str, ...] = ()
    """That did not come, or were lost first."""
    are_missing: bool = False
    """Whether these hosts themselves seem to be gone, rather than what ran on them."""
    bad_hosts: Mapping[str, str] = field(default_factory=dict)
    """Hosts that preflight found bad, with what is bad."""
    is_unanswered: bool = False
    """Of preflight: whether it has only missed ranks, and has not seen what is bad."""

    def as_event(self) -> dict[str, Any]:
        """Details of the event `failure`."""
        return {
            "kind": self.kind,
            "at": self.at,
            "rank": self.rank,
            "host": self.host,
            "message": self.message,
            "last_collective": self.last_collective,
            "step": self.step,
        }


@dataclass(frozen=True, kw_only=True)
class AttemptEnd:
    """One attempt, once nothing of it runs any more."""

    outcome: Literal["finished", "stopped", "failed"]
    """stopped: its ranks were asked to, or it had none yet."""
    failure: Failure | None = None
    """Of a failed one."""
    saved: bool = True
    """Of a stopped one: whether all that was trained is saved."""
    result: Mapping[str, Any] | None = None
    """Of a finished one: what rank 0 says of the run."""
    clear_at: float = 0.0
    """Seconds since 1970: by then ranks on hosts that have fallen silent have ended by themselves. Another attempt before it
    might train beside them."""
