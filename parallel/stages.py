"""Where a pipeline is cut, which rank holds which stage, and how long ranks stand idle. Imports without torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from parallel.config import PipelineSchedule

# A rank holds the first stages of the way down and the last ones of the way back.
V_SCHEDULES: tuple[PipelineSchedule, ...] = ("zbv", "dualpipev")
SINGLE_STAGE_SCHEDULES: tuple[PipelineSchedule, ...] = ("gpipe", "1f1b")
# They compute a weight's gradient apart from that of the input, to fill with it what would be idle time.
SPLIT_BACKWARD_SCHEDULES: tuple[PipelineSchedule, ...] = ("interleaved_zero_bubble", "zbv", "dualpipev")


def stages_per_rank(schedule: PipelineSchedule, asked: int | None) -> int:
    """Stages that a rank of the pipeline holds: as `asked`, else what the schedule is made for."""
    if asked is not None:
        return asked
    return 1 if schedule in SINGLE_STAGE_SCHEDULES else 2


def stages_of_rank(pp_rank: int, pp: int, num_stages: int, schedule: PipelineSchedule) -> tuple[int, ...]:
    """The stages that rank `pp_rank` of `pp` holds, in their order: r, r + pp, ... in a loop, r and 2 pp - 1 - r in a V.

    Raises ValueError where the stages cannot be dealt out so.
    """
    if num_stages % pp or (schedule in V_SCHEDULES and num_stages != 2 * pp):
        raise ValueError(f"{num_stages} stages cannot be dealt to {pp} ranks by the schedule {schedule}")
    if schedule in V_SCHEDULES:
        return (pp_rank, num_stages - 1 - pp_rank)
    return tuple(range(pp_rank, num_stages, pp))


def split_layers(
    costs: Sequence[float], *, embedding_cost: float, head_cost: float, num_stages: int
) -> tuple[int, ...]:
    """Layers of each stage such that the most expensive stage is as cheap as can be, at least one layer each.

    `costs` are those of the layers in order; the first stage also pays `embedding_cost`, the last one `head_cost`, all in one
    unit. Of equally good cuts, the one with the fewest layers in the first and the last stage, then the evenest.

    Raises ValueError where there are more stages than layers.
    """
    num_layers = len(costs)
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"{num_layers} layers cannot be cut into {num_stages} stages")
    before = [0.0, *accumulate(costs)]

    def cost(stage: int, start: int, end: int) -> float:
        extra = embedding_cost if stage == 0 else 0.0
        extra += head_cost if stage == num_stages - 1 else 0.0
        return before[end] - before[start] + extra

    def ends(stage: int) -> range:
        """Where a stage may end so that every other one gets a layer."""
        last = stage == num_stages - 1
        return range(num_layers if last else stage + 1, num_layers - num_stages + stage + 2)

    # cheapest[end]: the least possible maximum over the stages so far, when the last of them ends at `end`.
    cheapest = {0: 0.0}
    for stage in range(num_stages):
        cheapest = {
            end: min(max(so_far, cost(stage, start, end)) for start, so_far in cheapest.items() if start < end)
            for end in ends(stage)
        }
    # The same prefix sums are compared twice, in another order of max: nothing is rounded in between.
    limit = cheapest[num_layers]

    # best[end]: (layers in the outer stages, sum of squares, the cut), the least among the cuts within the limit.
    best: dict[int, tuple[int, float, tuple[int, ...]]] = {0: (0, 0.0, ())}
    for stage in range(num_stages):
        is_outer = stage in (0, num_stages - 1)
        best = {
            end: min(within)
            for end in ends(stage)
            if (
                within := [
                    (outer + is_outer * (end - start), squares + price**2, (*cut, end - start))
                    for start, (outer, squares, cut) in best.items()
                    if start < end and (price := cost(stage, start, end)) <= limit
                ]
            )
        }
    return best[num_layers][2]


def bubble_fraction(
    schedule: PipelineSchedule, pp: int, num_micro: int, stages_per_rank: int = 1, *, split_backward: bool = True
) -> float:
    """Expected share of a step in which a rank waits for the others (0 to 1), p ranks, m micro batches, v stages a rank.

    Assumes equal stages, free communication, and a backward that takes twice as long as the forward, half of it for the
    weights. Exact from m = p on (`dualpipev`: 2 p) where m is a multiple of p; below, a lower bound.

    - `gpipe` (Huang et al. 2019), `1f1b` (PipeDream-Flush, Narayanan et al. 2020): (p - 1) / (m + p - 1).
    - `interleaved_1f1b` (Narayanan et al. 2021, section 2.2.2): (p - 1) / (v m + p - 1).
    - `interleaved_zero_bubble`, `zbv` (Qi et al. 2023, 2024) and `dualpipev` (DeepSeek-V3, section 3.2.1): all that is left
      is the start, one forward a rank, since the optimizer steps on all ranks at once: (p - 1) / (3 v m + p - 1). Without
      `split_backward` there are no weights' gradients to fill gaps with, and it is that of `interleaved_1f1b` at best.
    """
    if pp == 1:
        return 0.0
    if schedule in SINGLE_STAGE_SCHEDULES:
        return (pp - 1) / (num_micro + pp - 1)
    parts = 3 if schedule in SPLIT_BACKWARD_SCHEDULES and split_backward else 1
    return (pp - 1) / (parts * stages_per_rank * num_micro + pp - 1)
