"""What one rank tells of one step: how long each of its collectives took, and how long it stood still for them.

Imports without torch. Clocks of ranks are never compared: only durations leave a rank, and a collective ends together.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.fabric.watch.state import pack_ranks, unpack_ranks

MOST_ENTRIES = 64
"""A group with more collectives in a step tells sums over neighbours, so that a message stays short."""


@dataclass(kw_only=True)
class Record:
    """One collective or message as it is observed; `seconds` is None until its end has been seen."""

    group: str
    """Name of the process group, unique in this process."""
    kind: str
    """all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, send, recv, ..."""
    num_bytes: int
    started: float
    """Seconds of this rank's own clock."""
    seconds: float | None = None
    waited_s: float = 0.0
    """How long the caller stood still for it."""


@dataclass(frozen=True, kw_only=True)
class TappedStep:
    """The collectives of one step as one rank has seen them."""

    records: tuple[Record, ...]
    """In the order of issue."""
    cost_s: float
    """Time that seeing has taken."""


class RankLists:
    """Ranks of groups as runs of equal stride, each list packed or unpacked once: a world of thousands takes three numbers,
    and at the head all accounts of one group share one tuple."""

    def __init__(self) -> None:
        self._packed: dict[tuple[int, ...], list[int]] = {}
        self._unpacked: dict[tuple[int, ...], tuple[int, ...]] = {}

    def pack(self, ranks: tuple[int, ...]) -> list[int]:
        """For a message; see `pack_ranks`."""
        if ranks not in self._packed:
            self._packed[ranks] = pack_ranks(ranks)
        return self._packed[ranks]

    def unpack(self, packed: Sequence[int]) -> tuple[int, ...]:
        """What `pack` made: the same object for equal lists."""
        key = tuple(packed)
        if key not in self._unpacked:
            self._unpacked[key] = unpack_ranks(key)
        return self._unpacked[key]


@dataclass(frozen=True, kw_only=True)
class GroupDurations:
    """The collectives of one group in one step, in the order in which this rank issued them."""

    axis: str
    ranks: tuple[int, ...]
    """World ranks of the group: two groups of one axis differ by them."""
    kinds: tuple[str, ...]
    num_bytes: tuple[int, ...]
    """Payload, as `parallel.ledger` counts it."""
    seconds: tuple[float | None, ...]
    """From the call to the end. None: the end was not seen."""
    waited_s: float
    """How long this rank stood still for all of them together."""


@dataclass(frozen=True, kw_only=True)
class StepDurations:
    """One rank's account of one step."""

    step: int
    role: str
    """Ranks with the same role have the same work to do (a stage of the pipeline), and may be compared."""
    step_s: float
    """The step with its data, as metrics.jsonl has it."""
    busy_s: float | None
    """The step without standing still for others. None where that cannot be told apart (a GPU's queue waits by itself)."""
    every: int
    """This rank tells of each `every`-th step."""
    cost_s: float
    """What watching this step has cost."""
    groups: tuple[GroupDurations, ...]

    def as_payload(self, lists: RankLists) -> dict[str, Any]:
        """For the side channel: short, plain data. Times in whole microseconds."""
        return {
            "step": self.step,
            "role": self.role,
            "took": _micro(self.step_s),
            "busy": _micro(self.busy_s),
            "every": self.every,
            "cost": _micro(self.cost_s),
            "groups": [
                {
                    "axis": group.axis,
                    "ranks": lists.pack(group.ranks),
                    "kinds": list(group.kinds),
                    "bytes": list(group.num_bytes),
                    "took": [_micro(seconds) for seconds in group.seconds],
                    "waited": _micro(group.waited_s),
                }
                for group in self.groups
            ],
        }

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any], lists: RankLists) -> StepDurations:
        """What `as_payload` made, to the microsecond."""
        return cls(
            step=payload["step"],
            role=payload["role"],
            step_s=payload["took"] / 1e6,
            busy_s=_seconds(payload["busy"]),
            every=payload["every"],
            cost_s=payload["cost"] / 1e6,
            groups=tuple(
                GroupDurations(
                    axis=group["axis"],
                    ranks=lists.unpack(group["ranks"]),
                    kinds=tuple(group["kinds"]),
                    num_bytes=tuple(group["bytes"]),
                    seconds=tuple(_seconds(took) for took in group["took"]),
                    waited_s=group["waited"] / 1e6,
                )
                for group in payload["groups"]
            ),
        )


def group_durations(axis: str, ranks: tuple[int, ...], records: Sequence[Record]) -> GroupDurations:
    """The records of one group, in order; neighbours of one kind are summed where there are more than `MOST_ENTRIES`.

    How they are summed depends on their number and kinds alone, which are the same on every rank of the group.
    """
    runs = _runs(records)
    return GroupDurations(
        axis=axis,
        ranks=ranks,
        kinds=tuple(run[0].kind for run in runs),
        num_bytes=tuple(sum(record.num_bytes for record in run) for run in runs),
        seconds=tuple(_total([record.seconds for record in run]) for run in runs),
        waited_s=sum(record.waited_s for record in records),
    )


def _runs(records: Sequence[Record]) -> list[Sequence[Record]]:
    by_kind: dict[str, list[Record]] = {}
    for record in records:
        by_kind.setdefault(record.kind, []).append(record)
    if len(records) <= MOST_ENTRIES:
        return [[record] for record in records]
    room = max(1, MOST_ENTRIES // len(by_kind))
    runs: list[Sequence[Record]] = []
    for same in by_kind.values():
        parts = min(room, len(same))
        edges = [len(same) * part // parts for part in range(parts + 1)]
        runs += [same[start:stop] for start, stop in itertools.pairwise(edges)]
    return runs


def _total(seconds: Sequence[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return sum(known) if len(known) == len(seconds) else None


def _micro(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1e6)


def _seconds(micro: int | None) -> float | None:
    return None if micro is None else micro / 1e6
