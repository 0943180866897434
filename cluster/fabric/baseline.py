"""Sweeps of a cluster kept over time, and what has become slower since.

Whether a change is more than noise is judged by the noise that was measured: how much the stored sweeps differ among
themselves where there are three or more, else how much the changes of single sizes scatter about that of their series.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.errors import FabricError
from cluster.fabric.bandwidth import bus_factor, message_steps
from cluster.fabric.statistics import noise_from_repeats, robust_spread, student_tail
from cluster.fabric.sweep import SweepResult, SweepRow, read_sweep
from cluster.fabric.wording import durations, rates

Metric = Literal["busbw", "latency", "correctness"]
Series = tuple[str, str, str, int]
"""Kind, group, mode, and ranks of a group."""
Key = tuple[Series, Metric]

LEAST_EFFECT = 0.10
"""Smallest change of interest, as a share."""
FALSE_ALARM_RATE = 0.01
"""Of a whole check of an unchanged cluster."""
_LEAST_HISTORY = 3
_HISTORY = 20
"""Stored sweeps, the newest, that tell how much runs differ."""
_CLEARLY = 4.0
"""Sizes so many times below the one at which alpha and beta cost the same tell of alpha, those so many times above it of
beta; those between of neither."""


@dataclass(frozen=True, kw_only=True)
class Regression:
    """Something that has become worse than in the baseline, by more than noise and the least effect of interest."""

    metric: Metric
    kind: str
    group: str
    mode: str
    before: float
    """busbw: bytes a second. latency: seconds. correctness: 1 where data were right."""
    now: float
    change_share: float
    """now / before - 1."""
    confidence: float
    """Probability, 0 to 1, that it is no accident, given the measured noise and the number of comparisons."""
    sentence: str


@dataclass(frozen=True, kw_only=True)
class BaselineCheck:
    """A sweep held against a stored one."""

    baseline: str
    """Name of the stored one."""
    taken_at: str
    """When it was taken."""
    regressions: tuple[Regression, ...]
    """The greatest change first."""
    num_compared: int
    noise_share: float | None
    """How much one run differs from another, as a share; None where nothing could tell."""
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]
    """Kinds on groups that one of the two has alone, in words."""

    @property
    def ok(self) -> bool:
        """Nothing has become worse. Else the exit code is 3."""
        return not self.regressions

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": self.ok, **asdict(self)}


class BaselineStore:
    """A folder with one JSON file a sweep, below one folder a cluster."""

    def __init__(self, root: Path, cluster: str) -> None:
        """Raises FabricError: `cluster` cannot name a folder."""
        self._folder = root / _checked(cluster, "cluster")

    def save(self, result: SweepResult, name: str | None = None) -> Path:
        """Writes it, as a whole or not at all. `name` is the time at which it was taken, unless given.

        Raises FabricError: the name is taken, or cannot name a file.
        """
        path = self._path(_default_name(result) if name is None else name)
        if path.exists():
            raise FabricError(f"{path} is there already: give another name, or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text(json.dumps(result.as_data(), indent=1) + "\n")
        unfinished.replace(path)
        return path

    def names(self) -> tuple[str, ...]:
        """Of all that are stored, the oldest first. Raises FabricError where one is not a sweep."""
        return tuple(sorted(self._all(), key=lambda name: self.load(name).taken_at))

    def load(self, name: str) -> SweepResult:
        """One of them. Raises FabricError where it is not there, or not a sweep."""
        path = self._path(name)
        if not path.exists():
            there = ", ".join(self._all()) or "none"
            raise FabricError(f"no baseline {name!r} in {self._folder}: there are {there}")
        return read_sweep(path)

    def check(self, result: SweepResult, against: str | None = None) -> BaselineCheck:
        """Holds `result` against a stored sweep: the newest of the same transport and world, unless named.

        Raises FabricError: there is none, or the named one is of another transport or world.
        """
        stored = {name: self.load(name) for name in self.names()}
        like = {name: each for name, each in stored.items() if _like(each, result)}
        if against is not None and against not in like:
            other = self.load(against)
            raise FabricError(f"baseline {against!r} is of {_described(other)}, this sweep of {_described(result)}")
        if not like:
            raise FabricError(f"no baseline in {self._folder} is of {_described(result)}: save one first")
        name = against or list(like)[-1]
        return compare_sweeps(result, like[name], name=name, history=list(like.values())[-_HISTORY:])

    def _all(self) -> list[str]:
        return sorted(path.stem for path in self._folder.glob("*.json"))

    def _path(self, name: str) -> Path:
        return self._folder / f"{_checked(name, 'baseline')}.json"


def compare_sweeps(
    now: SweepResult, before: SweepResult, *, name: str, history: Sequence[SweepResult] = ()
) -> BaselineCheck:
    """What is worse now than before: bus bandwidth where sizes are large, latency where they are small, and wrong data.

    history: sweeps of the same kind, `before` among them, that tell how much runs differ.
    """
    label = before.taken_at[:10] if name == _default_name(before) else f"{name} ({before.taken_at[:10]})"
    here, there = _by_series(now), _by_series(before)
    changes = _changes(here, there, _crossovers(before))
    noise = _run_noise(history, there, _crossovers(before), changes)
    found = [*_wrong_data(now)]
    for key, change in changes.items():
        error = math.hypot(max(noise.of_all, noise.of_one.get(key, 0.0)) * math.sqrt(2.0), change.error)
        worse = -change.log_ratio if key[1] == "busbw" else change.log_ratio
        least = -math.log1p(-LEAST_EFFECT) if key[1] == "busbw" else math.log1p(LEAST_EFFECT)
        tail = student_tail(worse / error, noise.dof) * len(changes) if error > 0 else float(worse <= 0)
        if worse >= least and tail <= FALSE_ALARM_RATE:
            found.append(_regression(key, change, confidence=1.0 - tail, label=label))
    return BaselineCheck(
        baseline=name,
        taken_at=before.taken_at,
        regressions=tuple(sorted(found, key=lambda each: -abs(math.log(max(1.0 + each.change_share, 1e-9))))),
        num_compared=len(changes),
        noise_share=noise.of_all if noise.of_all > 0 else None,
        only_here=_in_words(here.keys() - there.keys()),
        only_there=_in_words(there.keys() - here.keys()),
    )


@dataclass(frozen=True, kw_only=True)
class _Change:
    """One metric of one series in two sweeps: geometric means over the sizes that tell of it."""

    before: float
    now: float
    error: float
    """Standard error of the logarithm of their ratio, of the noise within the runs."""
    by_size: tuple[float, ...]
    """The logarithm of the ratio at each of these sizes."""

    @property
    def log_ratio(self) -> float:
        return math.log(self.now / self.before)


@dataclass(frozen=True, kw_only=True)
class _RunNoise:
    """Standard deviation of the logarithm of a figure from run to run."""

    of_all: float
    of_one: Mapping[Key, float]
    """Of single figures, where there are enough runs."""
    dof: float


def _changes(
    here: Mapping[Series, Sequence[SweepRow]],
    there: Mapping[Series, Sequence[SweepRow]],
    crossovers: Mapping[Series, float],
) -> dict[Key, _Change]:
    changes: dict[Key, _Change] = {}
    for series in sorted(here.keys() & there.keys()):
        old = {row.num_bytes: row for row in there[series]}
        pairs = [(old[row.num_bytes], row) for row in here[series] if row.num_bytes in old]
        for metric, sizes in _telling_sizes([row.num_bytes for _, row in pairs], crossovers.get(series, 0.0)).items():
            telling = [pair for pair in pairs if pair[1].num_bytes in sizes]
            noise = [math.hypot(before.times.noise_share, row.times.noise_share) for before, row in telling]
            old_figures, figures = (np.array([_figure(row, metric) for row in rows]) for rows in zip(*telling))
            changes[series, metric] = _Change(
                before=float(np.exp(np.log(old_figures).mean())),
                now=float(np.exp(np.log(figures).mean())),
                error=math.hypot(*noise) / len(noise),
                by_size=tuple(map(float, np.log(figures / old_figures))),
            )
    return changes


def _telling_sizes(sizes: Sequence[int], crossover: float) -> dict[Metric, set[int]]:
    """Which sizes tell of bandwidth (the largest always does), and which of latency."""
    if not sizes:
        return {}
    large = {size for size in sizes if size >= _CLEARLY * crossover} | {max(sizes)}
    small = {size for size in sizes if size * _CLEARLY <= crossover} - large
    return {"busbw": large, "latency": small} if small else {"busbw": large}


def _figure(row: SweepRow, metric: Metric) -> float:
    return row.busbw_bytes_per_s if metric == "busbw" else row.times.median_s


def _crossovers(result: SweepResult) -> dict[Series, float]:
    """The size at which alpha and beta cost the same, in bytes."""
    crossovers: dict[Series, float] = {}
    for fit in result.fits:
        model = fit.model
        fixed = message_steps(model.kind, model.group_size, model.algorithm) * model.alpha_s.value
        slope = bus_factor(model.kind, model.group_size) * model.beta_s_per_byte.value
        if slope > 0:
            crossovers[model.kind, fit.group, fit.mode, model.group_size] = fixed / slope
    return crossovers


def _run_noise(
    history: Sequence[SweepResult],
    there: Mapping[Series, Sequence[SweepRow]],
    crossovers: Mapping[Series, float],
    changes: Mapping[Key, _Change],
) -> _RunNoise:
    repeats: dict[Key, list[float]] = {}
    if len(history) < _LEAST_HISTORY:
        repeats = {key: list(change.by_size) for key, change in changes.items()}
    else:
        for result in history:
            for key, change in _changes(_by_series(result), there, crossovers).items():
                repeats.setdefault(key, []).append(change.log_ratio)
    keys = [key for key in repeats if len(repeats[key]) > 1]
    noise = noise_from_repeats(
        [value for key in keys for value in repeats[key]],
        [place for place, key in enumerate(keys) for _ in repeats[key]],
    )
    # Of two sizes in two runs each, the ratio has the noise of both runs.
    of_one_run = noise / math.sqrt(2.0) if len(history) < _LEAST_HISTORY else noise
    enough = [key for key in keys if len(history) > _LEAST_HISTORY and len(repeats[key]) > _LEAST_HISTORY]
    return _RunNoise(
        of_all=0.0 if math.isnan(of_one_run) else of_one_run,
        of_one={key: robust_spread(repeats[key]) for key in enough},
        dof=float(max(sum(len(repeats[key]) - 1 for key in keys), 1)),
    )


def _regression(key: Key, change: _Change, *, confidence: float, label: str) -> Regression:
    (kind, group, mode, _), metric = key
    share = math.expm1(change.log_ratio)
    what = f"{kind} on {group}" + ("" if mode == "isolated" else f", {mode.replace('_', ' ')},")
    if metric == "busbw":
        (before, now), unit = rates([change.before, change.now])
        sentence = f"busbw of {what} is {-100 * share:.0f} % below that of {label} ({before} -> {now} {unit})"
    else:
        (before, now), unit = durations([change.before, change.now])
        sentence = f"latency of {what} is {100 * share:.0f} % above that of {label} ({before} -> {now} {unit})"
    return Regression(
        metric=metric,
        kind=kind,
        group=group,
        mode=mode,
        before=change.before,
        now=change.now,
        change_share=share,
        confidence=confidence,
        sentence=sentence,
    )


def _wrong_data(now: SweepResult) -> list[Regression]:
    found = []
    for (kind, group, mode, _), rows in _by_series(now).items():
        sizes = [row.num_bytes for row in rows if not row.correct]
        if sizes:
            found.append(
                Regression(
                    metric="correctness",
                    kind=kind,
                    group=group,
                    mode=mode,
                    before=1.0,
                    now=0.0,
                    change_share=-1.0,
                    confidence=1.0,
                    sentence=f"{kind} on {group} gives wrong data at {', '.join(map(str, sizes))} bytes",
                )
            )
    return found


def _by_series(result: SweepResult) -> dict[Series, list[SweepRow]]:
    rows: dict[Series, list[SweepRow]] = {}
    for row in result.rows:
        rows.setdefault((row.kind, row.group, row.mode, row.group_size), []).append(row)
    return rows


def _like(one: SweepResult, other: SweepResult) -> bool:
    return (one.transport, one.world_size) == (other.transport, other.world_size)


def _described(result: SweepResult) -> str:
    return f"{result.world_size} ranks over {result.transport}"


def _in_words(series: set[Series]) -> tuple[str, ...]:
    return tuple(f"{kind} on {group} of {size} ranks, {mode}" for kind, group, mode, size in sorted(series))


def _default_name(result: SweepResult) -> str:
    return re.sub(r"[^0-9A-Za-z-]", "-", result.taken_at.removesuffix("+00:00"))


def _checked(name: str, what: str) -> str:
    if not re.fullmatch(r"[0-9A-Za-z_][0-9A-Za-z_.-]*", name):
        raise FabricError(f"{what} {name!r}: a name has letters, digits, '_', '-' and '.', and does not begin with '.'")
    return name
