"""Steps that all ranks have told of, gathered into windows: who was late, who worked how long, how long each axis took.

A collective ends together on all its ranks, so the LATE rank has the SHORTEST duration: late_r = max(dur) - dur_r, and the
shortest duration is what the network itself takes. Pure; imports without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from cluster.fabric.monitor.durations import GroupDurations, StepDurations

ENDS_TOGETHER = frozenset({"all_reduce", "all_gather", "reduce_scatter", "all_to_all"})
"""A broadcast's source may go on before the others have it, and a sender before the receiver."""
LEAST_SAMPLES = 3
"""Steps that a window needs, so that its medians mean something."""

GroupKey = tuple[str, tuple[int, ...]]
"""Axis and world ranks."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One step as all ranks told of it, by rank."""

    step: int
    ranks: Mapping[int, StepDurations]


@dataclass(frozen=True, kw_only=True)
class GroupTimes:
    """One group in one step."""

    floor_s: Mapping[str, float]
    """By kind of collective, the shortest duration of each, summed: what the network took, nobody's lateness in it."""
    late_s: Mapping[int, float]
    """By world rank: how much later than the first it came to the collectives, summed."""


@dataclass(frozen=True, kw_only=True)
class AxisTimes:
    """One axis in one window: medians over steps of means over ranks, in seconds a step."""

    waited_s: float
    """Standing still for it."""
    seconds: float
    """From call to end, all collectives summed: more than the wait where communication hides behind computing."""
    floor_s: float
    num_bytes: int
    count: float


@dataclass(frozen=True, kw_only=True)
class Window:
    """Some steps in a row: medians over those that were watched."""

    first_step: int
    last_step: int
    samples: tuple[Sample, ...]
    step_s: float
    busy_s: Mapping[int, float]
    """By rank; empty where ranks cannot tell it."""
    late_s: Mapping[int, float]
    """By rank, over all its groups."""
    axes: Mapping[str, AxisTimes]
    floor_s: Mapping[GroupKey, float]
    """What the network took in each group, in seconds a step."""
    kinds_s: Mapping[tuple[str, str], float]
    """The same by axis and kind, of the groups that rank 0 is in."""
    effects: tuple[Mapping[int, float], ...]
    """For each sample, by rank: by what share it works longer than the median of its peers. Without peers it is not there."""
    cost_share: float
    """Of a step: what the monitor costs."""


def group_times(sample: Sample) -> dict[GroupKey, GroupTimes]:
    """Each group all of whose ranks told the same collectives in one step; of them those that end together."""
    members: dict[GroupKey, dict[int, GroupDurations]] = {}
    for rank, told in sample.ranks.items():
        for group in told.groups:
            members.setdefault((group.axis, group.ranks), {})[rank] = group
    return {
        key: _times(by_rank)
        for key, by_rank in members.items()
        if len(by_rank) == len(key[1]) and len({group.kinds for group in by_rank.values()}) == 1
    }


def _times(by_rank: Mapping[int, GroupDurations]) -> GroupTimes:
    floor: dict[str, float] = {}
    late = dict.fromkeys(by_rank, 0.0)
    kinds = next(iter(by_rank.values())).kinds
    for place, kind in enumerate(kinds):
        took = {rank: group.seconds[place] for rank, group in by_rank.items()}
        known = {rank: seconds for rank, seconds in took.items() if seconds is not None}
        if kind not in ENDS_TOGETHER or len(known) < len(took):
            continue
        floor[kind] = floor.get(kind, 0.0) + min(known.values())
        longest = max(known.values())
        for rank, seconds in known.items():
            late[rank] += longest - seconds
    return GroupTimes(floor_s=floor, late_s=late)


def window_of(samples: Sequence[Sample]) -> Window:
    """The figures of one or more samples, in the order of steps."""
    ranks = sorted(samples[0].ranks)
    times = [group_times(sample) for sample in samples]
    busy = {rank: [sample.ranks[rank].busy_s for sample in samples] for rank in ranks}
    keys = sorted({key for each in times for key in each})
    return Window(
        first_step=samples[0].step,
        last_step=samples[-1].step,
        samples=tuple(samples),
        step_s=median(fmean(told.step_s for told in sample.ranks.values()) for sample in samples),
        busy_s={
            rank: median(known)
            for rank, values in busy.items()
            if len(known := [value for value in values if value is not None]) == len(values)
        },
        late_s={
            rank: median(sum(group.late_s.get(rank, 0.0) for group in each.values()) for each in times)
            for rank in ranks
        },
        axes=_axes(samples, times),
        floor_s={key: median(sum(each[key].floor_s.values()) for each in times if key in each) for key in keys},
        kinds_s=_kinds(times),
        effects=tuple(_effects(sample) for sample in samples),
        cost_share=median(
            fmean(told.cost_s / told.every / max(told.step_s, 1e-9) for told in sample.ranks.values())
            for sample in samples
        ),
    )


def _axes(samples: Sequence[Sample], times: Sequence[Mapping[GroupKey, GroupTimes]]) -> dict[str, AxisTimes]:
    names = sorted({group.axis for sample in samples for told in sample.ranks.values() for group in told.groups})
    result = {}
    for axis in names:
        waited, seconds, floors, num_bytes, counts = [], [], [], [], []
        for sample, groups in zip(samples, times, strict=True):
            of_axis = [[group for group in told.groups if group.axis == axis] for told in sample.ranks.values()]
            waited.append(fmean(sum(group.waited_s for group in mine) for mine in of_axis))
            seconds.append(fmean(sum(_known(group.seconds) for group in mine) for mine in of_axis))
            num_bytes.append(fmean(sum(sum(group.num_bytes) for group in mine) for mine in of_axis))
            counts.append(fmean(sum(len(group.kinds) for group in mine) for mine in of_axis))
            floors.append(
                max((sum(each.floor_s.values()) for key, each in groups.items() if key[0] == axis), default=0.0)
            )
        result[axis] = AxisTimes(
            waited_s=median(waited),
            seconds=median(seconds),
            floor_s=median(floors),
            num_bytes=round(median(num_bytes)),
            count=median(counts),
        )
    return result


def _kinds(times: Sequence[Mapping[GroupKey, GroupTimes]]) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], list[float]] = {}
    for each in times:
        here: dict[tuple[str, str], float] = {}
        for (axis, ranks), group in each.items():
            for kind, seconds in group.floor_s.items() if 0 in ranks else ():
                here[axis, kind] = here.get((axis, kind), 0.0) + seconds
        for key, seconds in here.items():
            found.setdefault(key, []).append(seconds)
    return {key: median(values) for key, values in sorted(found.items())}


def work_of(told: StepDurations) -> float:
    """Seconds of a step that a rank worked; where it cannot tell, the step without the time in its collectives' hands."""
    if told.busy_s is not None:
        return told.busy_s
    in_hands = sum(_known(group.seconds) for group in told.groups)
    return max(told.step_s - in_hands, 0.1 * told.step_s)


def roles_of(sample: Sample) -> dict[str, list[int]]:
    """Ranks by role."""
    roles: dict[str, list[int]] = {}
    for rank, told in sample.ranks.items():
        roles.setdefault(told.role, []).append(rank)
    return roles


def _effects(sample: Sample) -> dict[int, float]:
    effects = {}
    for ranks in roles_of(sample).values():
        work = sorted((work_of(sample.ranks[rank]), rank) for rank in ranks)
        for place, (own, rank) in enumerate(work) if len(work) > 1 else ():
            effects[rank] = own / max(_median_without(work, place), 1e-9) - 1.0
    return effects


def _median_without(work: Sequence[tuple[float, int]], left_out: int) -> float:
    """Of sorted values without one: sorting anew for each rank would take minutes where there are thousands."""
    count = len(work) - 1
    middle = [(count - 1) // 2, count // 2]
    return fmean(work[place + (place >= left_out)][0] for place in middle)


def _known(seconds: Sequence[float | None]) -> float:
    return sum(value for value in seconds if value is not None)


class Gathering:
    """Messages of ranks become samples once all have told of a step, and samples windows."""

    def __init__(self, *, world_size: int, window_steps: int) -> None:
        self._world_size = world_size
        self._window_steps = window_steps
        self._pending: dict[int, dict[int, StepDurations]] = {}
        self._samples: list[Sample] = []

    def add(self, rank: int, told: StepDurations) -> Window | None:
        """One rank's account. A window where this completes one."""
        by_rank = self._pending.setdefault(told.step, {})
        by_rank[rank] = told
        if len(by_rank) < self._world_size:
            self._forget_old()
            return None
        del self._pending[told.step]
        if self._samples and told.step <= self._samples[-1].step:  # the run went back to a checkpoint
            self._samples = []
        self._samples.append(Sample(step=told.step, ranks=dict(sorted(by_rank.items()))))
        length = told.step - self._samples[0].step + told.every
        if len(self._samples) < LEAST_SAMPLES or length < self._window_steps:
            return None
        window = window_of(self._samples)
        self._samples = []
        return window

    def _forget_old(self) -> None:
        """Steps that some rank has not watched, or has not got through to tell of, must not pile up."""
        while len(self._pending) > 32:
            del self._pending[min(self._pending)]
