"""Where a pipeline is cut, who holds what, and the idle share, the last against torch's own schedules."""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import schedules as torch_schedules

from parallel.config import PipelineSchedule
from parallel.stages import V_SCHEDULES, bubble_fraction, split_layers, stages_of_rank, stages_per_rank

_TORCH: dict[str, Any] = {
    "interleaved_1f1b": torch_schedules.ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
    "dualpipev": torch_schedules.ScheduleDualPipeV,
}


def _stage_costs(split: tuple[int, ...], costs: list[float], embedding: float, head: float) -> list[float]:
    ends = [sum(split[: stage + 1]) for stage in range(len(split))]
    paid = [sum(costs[end - size : end]) for end, size in zip(ends, split, strict=True)]
    paid[0] += embedding
    paid[-1] += head
    return paid


@pytest.mark.parametrize("seed", range(20))
def test_no_cut_has_a_cheaper_most_expensive_stage(seed: int) -> None:
    chance = random.Random(seed)
    costs = [chance.choice((1.0, 1.0, 2.5, 3.0)) for _ in range(chance.randint(2, 9))]
    embedding, head = chance.choice((0.0, 0.5)), chance.choice((0.0, 1.5, 4.0))
    num_stages = chance.randint(1, len(costs))
    split = split_layers(costs, embedding_cost=embedding, head_cost=head, num_stages=num_stages)
    assert sum(split) == len(costs)
    assert len(split) == num_stages
    assert min(split) >= 1
    every = [
        tuple(end - start for start, end in zip((0, *ends), (*ends, len(costs)), strict=True))
        for ends in combinations(range(1, len(costs)), num_stages - 1)
    ]
    worst = {each: max(_stage_costs(each, costs, embedding, head)) for each in every}
    assert worst[split] == pytest.approx(min(worst.values()))
    outer = [each[0] + each[-1] for each, price in worst.items() if price <= worst[split] + 1e-9]
    assert split[0] + split[-1] == min(outer)


@pytest.mark.parametrize(
    ("num_layers", "head", "num_stages", "split"),
    [
        (8, 0.0, 4, (2, 2, 2, 2)),
        (10, 0.0, 4, (2, 3, 3, 2)),  # equally good: fewer at the ends, then even
        (8, 2.0, 4, (1, 3, 3, 1)),  # the head is worth two layers
        (5, 0.0, 5, (1, 1, 1, 1, 1)),
        (3, 9.0, 1, (3,)),
    ],
)
def test_the_head_counts(num_layers: int, head: float, num_stages: int, split: tuple[int, ...]) -> None:
    assert split_layers([1.0] * num_layers, embedding_cost=0.1, head_cost=head, num_stages=num_stages) == split


def test_more_stages_than_layers_cannot_be() -> None:
    with pytest.raises(ValueError, match="2 layers cannot be cut into 3 stages"):
        split_layers([1.0, 1.0], embedding_cost=0.0, head_cost=0.0, num_stages=3)


def test_stages_lie_in_a_loop_or_a_v() -> None:
    assert [stages_of_rank(rank, 2, 4, "interleaved_1f1b") for rank in range(2)] == [(0, 2), (1, 3)]
    assert [stages_of_rank(rank, 3, 3, "1f1b") for rank in range(3)] == [(0,), (1,), (2,)]
    for schedule in V_SCHEDULES:
        assert [stages_of_rank(rank, 2, 4, schedule) for rank in range(2)] == [(0, 3), (1, 2)]
        with pytest.raises(ValueError, match="6 stages cannot be dealt to 2 ranks"):
            stages_of_rank(0, 2, 6, schedule)
    with pytest.raises(ValueError, match="3 stages cannot be dealt to 2 ranks by the schedule gpipe"):
        stages_of_rank(0, 2, 3, "gpipe")


def test_a_schedule_brings_its_number_of_stages() -> None:
    schedules: tuple[PipelineSchedule, ...] = ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv")
    assert [stages_per_rank(schedule, None) for schedule in schedules] == [1, 1, 2, 2, 2]
    assert stages_per_rank("interleaved_1f1b", 3) == 3


@pytest.mark.parametrize(
    ("schedule", "pp", "num_micro", "held"),
    [
        ("interleaved_1f1b", 2, 4, 1),  # which is 1f1b
        ("interleaved_1f1b", 4, 8, 2),
        ("interleaved_1f1b", 4, 8, 3),
        ("interleaved_zero_bubble", 2, 8, 2),
        ("interleaved_zero_bubble", 4, 8, 1),
        ("zbv", 4, 8, 2),
        ("dualpipev", 2, 4, 2),
        ("dualpipev", 4, 16, 2),
    ],
)
def test_the_idle_share_is_that_of_torchs_order(schedule: PipelineSchedule, pp: int, num_micro: int, held: int) -> None:
    assert _idle_share(schedule, pp, num_micro, held) == pytest.approx(bubble_fraction(schedule, pp, num_micro, held))


def test_the_idle_share_by_hand() -> None:
    assert bubble_fraction("gpipe", 4, 4) == pytest.approx(3 / 7)
    assert bubble_fraction("1f1b", 4, 12) == pytest.approx(3 / 15)
    assert bubble_fraction("interleaved_1f1b", 4, 4, 2) == pytest.approx(3 / 11)
    assert bubble_fraction("zbv", 4, 8, 2) == pytest.approx(3 / 51)
    assert bubble_fraction("1f1b", 1, 4) == 0.0


class _Stage:
    """What a schedule asks of a stage to make its plan."""

    def __init__(self, index: int, num_stages: int, pp: int) -> None:
        self.stage_index, self.num_stages, self.group_rank, self.group_size = index, num_stages, 0, pp
        self.is_first, self.is_last, self.has_backward = index == 0, index == num_stages - 1, True
        self.submod, self.device, self.group = torch.nn.Identity(), torch.device("cpu"), None


def _idle_share(schedule: PipelineSchedule, pp: int, num_micro: int, held: int) -> float:
    """Runs torch's order of computation with a forward, an input's and a weight's gradient of one unit each."""
    num_stages = pp * held
    stages = [_Stage(index, num_stages, pp) for index in stages_of_rank(0, pp, num_stages, schedule)]
    order = _TORCH[schedule](stages, num_micro, loss_fn=lambda output, target: output).pipeline_order
    kinds = torch_schedules._ComputationType
    todo = {
        rank: [part for action in actions if action for part in (action.sub_actions or (action,))]
        for rank, actions in order.items()
    }
    clock = dict.fromkeys(todo, 0)
    done: dict[tuple[str, int, int], int] = {}
    while any(todo.values()):
        for rank, actions in todo.items():
            while actions:
                stage, kind, micro = actions[0].stage_index, actions[0].computation_type, actions[0].microbatch_index
                if kind == kinds.FORWARD:
                    what, needs, units = "F", [("F", stage - 1, micro)] if stage else [], 1
                elif kind == kinds.BACKWARD_WEIGHT:
                    what, needs, units = "W", [("I", stage, micro)], 1
                else:
                    later = [("I", stage + 1, micro)] if stage < num_stages - 1 else []
                    what, needs, units = "I", [("F", stage, micro), *later], 2 if kind == kinds.FULL_BACKWARD else 1
                if any(need not in done for need in needs):
                    break
                clock[rank] = max([clock[rank], *(done[need] for need in needs)]) + units
                done[what, stage, micro] = clock[rank]
                actions.pop(0)
    return 1 - 3 * held * num_micro / max(clock.values())
