"""Steps that all ranks have told of, gathered into windows: who was late, who worked how long, how long each axis took.

A collective ends together on all its ranks, so the LATE rank has the SHORTEST duration: late_r = max(dur) - dur_r, and the
shortest duration is what the network itself takes. Pure; imports without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    """One step as the ranks told of it, by rank; one whose message was lost is not there."""

    step: int
    ranks: Mapping[int, StepDurations]


@dataclass(frozen=True, kw_only=True)
class GroupTimes:
    """One group in one step."""

    floor_s: Mapping[str, float]
    """By kind of collective, the shortest duration of each, summed: what the network took, nobody's lateness in it."""
    late_s: Mapping[int, float]
    """By world rank: how much later than the first it came to the collectives, summed."""
    ahead_s: Mapping[int, float]
    """By world rank: how much earlier than the last it came to them, summed."""


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
    burdens: tuple[Mapping[int, float], ...]
    """For each sample, by rank, what that is concluded from: see `burdens_of`."""
    roles: Mapping[int, str]
    """Of all ranks of the samples."""
    cost_share: float
    """Of a step: what the monitor costs."""


def group_times(sample: Sample) -> dict[GroupKey, GroupTimes]:
    """Each group all of whose ranks told the same collectives in one step; of them those that end together.

    Process groups with one axis and the same ranks count as one.
    """
    members: dict[GroupKey, dict[int, list[GroupDurations]]] = {}
    for rank, told in sample.ranks.items():
        for group in told.groups:
            members.setdefault((group.axis, group.ranks), {}).setdefault(rank, []).append(group)
    merged = {key: {rank: _merged(groups) for rank, groups in ranks.items()} for key, ranks in members.items()}
    return {
        key: _times(by_rank)
        for key, by_rank in merged.items()
        if len(by_rank) == len(key[1]) and len({group.kinds for group in by_rank.values()}) == 1
    }


def _merged(groups: Sequence[GroupDurations]) -> GroupDurations:
    """In an order that does not depend on which of them a rank has used first."""
    if len(groups) == 1:
        return groups[0]
    ordered = sorted(groups, key=lambda group: (group.kinds, group.num_bytes))
    return replace(
        ordered[0],
        kinds=tuple(kind for group in ordered for kind in group.kinds),
        num_bytes=tuple(size for group in ordered for size in group.num_bytes),
        seconds=tuple(seconds for group in ordered for seconds in group.seconds),
        waited_s=sum(group.waited_s for group in ordered),
    )


def _times(by_rank: Mapping[int, GroupDurations]) -> GroupTimes:
    floor: dict[str, float] = {}
    late = dict.fromkeys(by_rank, 0.0)
    ahead = dict.fromkeys(by_rank, 0.0)
    kinds = next(iter(by_rank.values())).kinds
    for place, kind in enumerate(kinds):
        took = {rank: group.seconds[place] for rank, group in by_rank.items()}
        known = {rank: seconds for rank, seconds in took.items() if seconds is not None}
        if kind not in ENDS_TOGETHER or len(known) < len(took):
            continue
        shortest, longest = min(known.values()), max(known.values())
        floor[kind] = floor.get(kind, 0.0) + shortest
        for rank, seconds in known.items():
            late[rank] += longest - seconds
            ahead[rank] += seconds - shortest
    return GroupTimes(floor_s=floor, late_s=late, ahead_s=ahead)


def window_of(samples: Sequence[Sample]) -> Window:
    """The figures of one or more samples, in the order of steps; of a rank, over the samples that it has told of."""
    roles = {rank: told.role for sample in samples for rank, told in sorted(sample.ranks.items())}
    times = [group_times(sample) for sample in samples]
    late = [_lateness(sample, groups) for sample, groups in zip(samples, times, strict=True)]
    burdens = tuple(burdens_of(sample, groups) for sample, groups in zip(samples, times, strict=True))
    keys = sorted({key for each in times for key in each})
    return Window(
        first_step=samples[0].step,
        last_step=samples[-1].step,
        samples=tuple(samples),
        step_s=median(fmean(told.step_s for told in sample.ranks.values()) for sample in samples),
        busy_s=_busy(samples, sorted(roles)),
        late_s={rank: median(each[rank] for each in late if rank in each) for rank in sorted(roles)},
        axes=_axes(samples, times),
        floor_s={key: median(sum(each[key].floor_s.values()) for each in times if key in each) for key in keys},
        kinds_s=_kinds(times),
        effects=tuple(_effects(sample, each) for sample, each in zip(samples, burdens, strict=True)),
        burdens=burdens,
        roles=roles,
        cost_share=median(
            fmean(told.cost_s / told.every / max(told.step_s, 1e-9) for told in sample.ranks.values())
            for sample in samples
        ),
    )


def _busy(samples: Sequence[Sample], ranks: Sequence[int]) -> dict[int, float]:
    told = {rank: [sample.ranks[rank].busy_s for sample in samples if rank in sample.ranks] for rank in ranks}
    return {
        rank: median(known)
        for rank, values in told.items()
        if len(known := [value for value in values if value is not None]) == len(values)
    }


def _lateness(sample: Sample, groups: Mapping[GroupKey, GroupTimes]) -> dict[int, float]:
    late = dict.fromkeys(sample.ranks, 0.0)
    for group in groups.values():
        for rank, seconds in group.late_s.items():
            late[rank] += seconds
    return late


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


def knows_work(sample: Sample) -> bool:
    """Whether its ranks can tell working from standing still."""
    return all(told.busy_s is not None for told in sample.ranks.values())


def burdens_of(sample: Sample, groups: Mapping[GroupKey, GroupTimes]) -> dict[int, float]:
    """By rank, in seconds of one step: how long it worked; where ranks cannot tell that, how late it came by its own fault.

    That is how late it was in the group that it was latest in, less what it had been kept waiting itself in any group: one
    that waits for a late rank in one group is late in the next, and not to blame. Where communication hides behind computing,
    durations say nothing about work, and lateness is all there is.
    """
    if knows_work(sample):
        return {rank: told.busy_s or 0.0 for rank, told in sample.ranks.items()}
    late = dict.fromkeys(sample.ranks, 0.0)
    ahead = dict.fromkeys(sample.ranks, 0.0)
    for group in groups.values():
        for rank, seconds in group.late_s.items():
            late[rank] = max(late[rank], seconds)
            ahead[rank] += group.ahead_s[rank]
    return {rank: max(0.0, late[rank] - ahead[rank]) for rank in late}


def _effects(sample: Sample, burdens: Mapping[int, float]) -> dict[int, float]:
    by_role: dict[str, list[int]] = {}
    for rank, told in sample.ranks.items():
        by_role.setdefault(told.role, []).append(rank)
    effects = {}
    for ranks in by_role.values():
        burden = sorted((burdens[rank], rank) for rank in ranks)
        for place, (own, rank) in enumerate(burden) if len(burden) > 1 else ():
            usual = _median_without(burden, place)
            if not knows_work(sample):  # without its lateness the step would be so much shorter
                usual = max(sample.ranks[rank].step_s - (own - usual), 0.1 * sample.ranks[rank].step_s)
                own = sample.ranks[rank].step_s
            effects[rank] = own / max(usual, 1e-9) - 1.0
    return effects


def _median_without(work: Sequence[tuple[float, int]], left_out: int) -> float:
    """Of sorted values without one: sorting anew for each rank would take minutes where there are thousands."""
    count = len(work) - 1
    middle = [(count - 1) // 2, count // 2]
    return fmean(work[place + (place >= left_out)][0] for place in middle)


def _known(seconds: Sequence[float | None]) -> float:
    return sum(value for value in seconds if value is not None)
