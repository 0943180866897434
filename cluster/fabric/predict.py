"""How long a step's communication should take, by a sweep's fitted models, beside how long it took."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.fabric.bandwidth import Interval
from cluster.fabric.groups import flattened_axes
from cluster.fabric.sweep import GroupFit, Mode, SweepResult
from cluster.fabric.wording import duration, durations

# As the ledger names a kind -> as its cost is reckoned. Any other is reckoned as it is called.
_RECKONED_AS = {"send": "send_recv", "recv": "send_recv", "barrier": "all_reduce"}
_RECKONABLE = frozenset(
    {
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "all_to_all",
        "broadcast",
        "reduce",
        "gather",
        "scatter",
        "send_recv",
    }
)
_STAND_INS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "send_recv")
"""Whose alpha and beta serve for a kind that was not measured, in this order: all are of one message and one link."""
_OF_ONE_RANK = frozenset({"gather", "scatter"})
"""The ledger counts what one rank gives or gets; the size in the time model is that of all ranks."""
_CONTROL = "control"
_DATA = "dp"
_WORLD = "world"
_LEAST_EFFECT = 0.10

DEFAULT_MODES: tuple[Mode, ...] = ("together", "isolated", "with_compute")
"""In training all groups of an axis talk at about the same time."""


@dataclass(frozen=True, kw_only=True)
class CommunicationRow:
    """One kind of communication of a rank in one step."""

    axis: str
    """As the communication ledger calls it, such as `tp` or `dp_shard_cp`."""
    kind: str
    """As the ledger calls it: all_reduce, ..., send, recv, barrier."""
    count: float
    num_bytes: float
    """Of all `count` together, as the ledger counts them: the tensor of an all-reduce, a broadcast, a message; the
    gathered result; a rank's whole input of a reduce-scatter and an all-to-all."""
    group_size: int


@dataclass(frozen=True, kw_only=True)
class ExpectedTime:
    """What one row should cost."""

    row: CommunicationRow
    seconds: Interval | None
    """In a step, one after another, with the 95 % interval of the fit; None where the sweep has nothing for it."""
    source: str | None
    """Which fit it comes from, such as `all_reduce on tp, together`."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a step's communication should cost."""

    rows: tuple[ExpectedTime, ...]

    @property
    def by_axis(self) -> dict[str, float]:
        """Seconds of a step on each axis: one communication after another, but sends beside receives."""
        totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for each in self.rows:
            if each.seconds is not None:
                totals[each.row.axis][each.row.kind] += each.seconds.value
        return {
            axis: sum(of_kind.values()) - min(of_kind.get("send", 0.0), of_kind.get("recv", 0.0))
            for axis, of_kind in totals.items()
        }

    @property
    def seconds(self) -> float:
        """Of a step, over all axes, if none of it ran beside computation or beside that of another axis."""
        return sum(self.by_axis.values())

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return {"seconds": self.seconds, "by_axis": self.by_axis, "rows": [asdict(each) for each in self.rows]}


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
    share: float | None
    """measured / expected - 1, where both are there."""
    notable: bool
    """By 10 % or more, and outside the interval of what was expected."""
    sentence: str

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def predict(
    profile: SweepResult, rows: Sequence[CommunicationRow], *, modes: Sequence[Mode] = DEFAULT_MODES
) -> Prediction:
    """Expected seconds of each row, from the fits of a sweep.

    A row's axis is looked for among the sweep's groups by its name; then, flattened axes without those of one rank (which
    no sweep has); then the world's alpha and beta stand in. Within a group, kinds that were not measured take the alpha and
    beta of one that was. `source` tells which it was.

    modes: which of the measured modes counts, the first that is there.
    """
    return Prediction(rows=tuple(_expect(profile, row, modes) for row in rows))


def compare(expected: Prediction, measured: Sequence[MeasuredTime]) -> tuple[Difference, ...]:
    """Both as one table: a row for each axis and kind that either has, in that order."""
    due: dict[tuple[str, str], list[ExpectedTime]] = defaultdict(list)
    for each in expected.rows:
        due[each.row.axis, each.row.kind].append(each)
    took: dict[tuple[str, str], float] = defaultdict(float)
    for time in measured:
        took[time.axis, time.kind] += time.seconds
    return tuple(_difference(axis, kind, due.get((axis, kind), []), took) for axis, kind in sorted({*due, *took}))


def compare_step(expected: Prediction, measured_s: float) -> Difference:
    """The communication of a whole step: measured seconds beside `expected.seconds`."""
    sure = bool(expected.rows) and all(each.seconds is not None for each in expected.rows)
    whole = Interval(value=expected.seconds, low=None, high=None) if sure else None
    return _sentence("all axes", "communication", whole, measured_s)


def _expect(profile: SweepResult, row: CommunicationRow, modes: Sequence[Mode]) -> ExpectedTime:
    kind = _RECKONED_AS.get(row.kind, row.kind)
    if kind not in _RECKONABLE or row.group_size < 2:
        return ExpectedTime(row=row, seconds=None, source=None)
    fits = {(fit.group, fit.mode, fit.model.kind): fit for fit in profile.fits}
    for group in _groups_for(profile, row):
        for candidate in dict.fromkeys((kind, *_STAND_INS)):
            for mode in modes:
                fit = fits.get((group, mode, candidate))
                if fit is not None:
                    model = replace(fit.model, kind=kind, group_size=row.group_size)
                    size = row.num_bytes * (row.group_size if kind in _OF_ONE_RANK else 1)
                    return ExpectedTime(
                        row=row, seconds=model.seconds(size, count=row.count), source=_source(fit, row, kind)
                    )
    return ExpectedTime(row=row, seconds=None, source=None)


def _groups_for(profile: SweepResult, row: CommunicationRow) -> list[str]:
    """Names of the sweep's sets that may speak for a row, the best first."""
    sizes = {groups.name: groups.group_size for groups in profile.groups}
    if row.axis == _CONTROL:  # carried by gloo, whatever the run's transport
        return [_WORLD] if profile.transport == "gloo" else []
    parts = flattened_axes(row.axis) or ()
    split = "_".join(part for part in parts if part in sizes)
    names = [split, _DATA] if any(part.startswith(_DATA) for part in parts) else [split]
    same = [name for name in names if sizes.get(name) == row.group_size]
    return list(dict.fromkeys(([row.axis] if row.axis in sizes else []) + same + [_WORLD]))


def _source(fit: GroupFit, row: CommunicationRow, kind: str) -> str:
    text = f"{fit.model.kind} on {fit.group}, {fit.mode.replace('_', ' ')}"
    stands_in = fit.model.kind != kind or fit.model.group_size != row.group_size
    return f"{text}, standing in" if stands_in else text


def _difference(
    axis: str, kind: str, expected: Sequence[ExpectedTime], took: Mapping[tuple[str, str], float]
) -> Difference:
    known = [each.seconds for each in expected if each.seconds is not None]
    whole = _sum(known) if known and len(known) == len(expected) else None
    return _sentence(axis, kind, whole, took.get((axis, kind)))


def _sum(intervals: Sequence[Interval]) -> Interval:
    """Of times from one fit, whose errors go together: so do their ends."""
    value = sum(each.value for each in intervals)
    lows, highs = [each.low for each in intervals], [each.high for each in intervals]
    if any(end is None for end in (*lows, *highs)):
        return Interval(value=value, low=None, high=None)
    return Interval(value=value, low=sum(end or 0.0 for end in lows), high=sum(end or 0.0 for end in highs))


def _sentence(axis: str, kind: str, expected: Interval | None, measured_s: float | None) -> Difference:
    share = None
    notable = False
    if expected is not None and measured_s is not None:
        (due, took), unit = durations([expected.value, measured_s])
        share = measured_s / expected.value - 1 if expected.value > 0 else None
        within = expected.low is not None and expected.high is not None and expected.low <= measured_s <= expected.high
        notable = share is not None and abs(share) >= _LEAST_EFFECT and not within
        told = f"{due} {unit} expected, {took} {unit} measured"
        text = told if share is None else f"{told} ({100 * share:+.0f} %)"
    elif expected is not None:
        text = f"{duration(expected.value)} expected, not measured"
    elif measured_s is not None:
        text = f"{duration(measured_s)} measured, nothing to expect it by"
    else:
        text = "nothing to expect it by, not measured"
    return Difference(
        axis=axis,
        kind=kind,
        expected=expected,
        measured_s=measured_s,
        share=share,
        notable=notable,
        sentence=f"{kind} on {axis}: {text}",
    )
