"""How long a step's communication should take, by a sweep's fitted models, beside how long it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.fabric.bandwidth import Interval
from cluster.fabric.sweep import SweepResult


@dataclass(frozen=True, kw_only=True)
class CommunicationRow:
    """One kind of communication of a rank in one step."""

    axis: str
    """As the communication ledger calls it, such as `tp` or `dp_shard_cp`."""
    kind: str
    """As the ledger calls it: all_reduce, ..., send, recv, barrier."""
    count: int
    num_bytes: int
    """Of all `count` together, as the ledger counts them."""
    group_size: int


@dataclass(frozen=True, kw_only=True)
class ExpectedTime:
    """What one row should cost."""

    row: CommunicationRow
    seconds: Interval | None
    """In a step, one after another, with the 95 % interval of the fit; None where the sweep has nothing for it."""
    source: str | None
    """Which fit it comes from, such as "all_reduce on tp, together"."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a step's communication should cost."""

    rows: tuple[ExpectedTime, ...]

    @property
    def seconds(self) -> float:
        """Of a step: all rows one after another, none of it beside computation. Sends of an axis run beside its receives."""
        raise NotImplementedError

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class MeasuredTime:
    """What one kind of communication took in a step."""

    axis: str
    kind: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Expected beside measured, for one axis and kind."""

    axis: str
    kind: str
    expected: Interval | None
    measured_s: float | None
    notable: bool
    """Outside the interval, and by 10 % or more."""
    sentence: str


def predict(profile: SweepResult, rows: Sequence[CommunicationRow]) -> Prediction:
    """Expected seconds of each row, from the fits of the sweep."""
    raise NotImplementedError


def compare(expected: Prediction, measured: Sequence[MeasuredTime]) -> tuple[Difference, ...]:
    """Both as one table, in the order of axis and kind."""
    raise NotImplementedError
