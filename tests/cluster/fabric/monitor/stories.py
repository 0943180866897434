"""Made-up steps of made-up ranks, for tests of what the monitor concludes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from cluster.fabric.monitor.durations import GroupDurations, StepDurations
from cluster.fabric.monitor.gathering import Gathering
from cluster.fabric.monitor.windows import Window

WORLD = ("world", (0, 1, 2, 3))


def step_of(
    step: int,
    work_s: Mapping[int, float],
    *,
    network_s: float | Mapping[tuple[str, tuple[int, ...]], float] = 0.02,
    groups: Sequence[tuple[str, tuple[int, ...]]] = (WORLD,),
    noise: random.Random | None = None,
    roles: Mapping[int, str] | None = None,
    knows_waits: bool = True,
    every: int = 1,
) -> dict[int, StepDurations]:
    """One step in which each rank works for `work_s`, and then meets the others of each of its groups in one all-reduce,
    which takes `network_s` from when the last has come. `noise` is three percent of the work."""
    work = {rank: seconds * (1 + (noise.gauss(0, 0.03) if noise else 0.0)) for rank, seconds in work_s.items()}
    clock = dict(work)
    took: dict[int, list[GroupDurations]] = {rank: [] for rank in work}
    for axis, ranks in groups:
        network = network_s if isinstance(network_s, float) else network_s[axis, ranks]
        end = max(clock[rank] for rank in ranks) + network * (1 + (noise.gauss(0, 0.03) if noise else 0.0))
        for rank in ranks:
            seconds = end - clock[rank]
            took[rank].append(
                GroupDurations(
                    axis=axis,
                    ranks=ranks,
                    kinds=("all_reduce",),
                    num_bytes=(1000,),
                    seconds=(seconds,),
                    waited_s=seconds,
                )
            )
            clock[rank] = end
    step_s = max(clock.values())
    return {
        rank: StepDurations(
            step=step,
            role=(roles or {}).get(rank, "stage 0"),
            step_s=step_s,
            busy_s=work[rank] if knows_waits else None,
            every=every,
            cost_s=1e-4,
            groups=tuple(took[rank]),
        )
        for rank in work
    }


def windows_of(
    steps: Sequence[int], make: Callable[[int], dict[int, StepDurations]], *, length: int = 5
) -> list[Window]:
    """The windows of a run whose step `s` is `make(s)`."""
    first = make(steps[0])
    gathering = Gathering(world_size=len(first), window_steps=length)
    accounts = ((rank, told) for step in steps for rank, told in make(step).items())
    return [window for rank, told in accounts for window in gathering.add(rank, told, 0.0)]
