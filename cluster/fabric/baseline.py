"""Sweeps of a cluster kept over time, and what has become slower since."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.fabric.sweep import SweepResult


@dataclass(frozen=True, kw_only=True)
class Regression:
    """Something that has become slower than in the baseline, by more than the noise and the least effect of interest."""

    metric: Literal["busbw", "latency", "correctness"]
    kind: str
    group: str
    mode: str
    before: float
    """busbw: bytes a second. latency: seconds."""
    now: float
    change_share: float
    """now / before - 1."""
    confidence: float
    sentence: str


@dataclass(frozen=True, kw_only=True)
class BaselineCheck:
    """A sweep held against a stored one."""

    baseline: str
    """Name of the stored one."""
    regressions: tuple[Regression, ...]
    num_compared: int
    """Comparisons made: kinds, groups and modes that both have."""
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]
    """What one of the two has alone, in words."""

    @property
    def ok(self) -> bool:
        """Nothing has become slower. Else the exit code is 3."""
        return not self.regressions

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        raise NotImplementedError


class BaselineStore:
    """A folder with one JSON file a sweep, below one folder a cluster."""

    def __init__(self, root: Path, cluster: str) -> None:
        self._folder = root / cluster

    def save(self, result: SweepResult, name: str | None = None) -> Path:
        """Writes it; `name` is the time at which it was taken unless given."""
        raise NotImplementedError

    def names(self) -> tuple[str, ...]:
        """Of all that are stored, the oldest first."""
        raise NotImplementedError

    def load(self, name: str) -> SweepResult:
        """One of them. Raises FabricError where it is not there or not a sweep."""
        raise NotImplementedError

    def check(self, result: SweepResult, against: str | None = None) -> BaselineCheck:
        """Holds `result` against a stored one, the newest unless named; all stored ones tell how much runs differ."""
        raise NotImplementedError
