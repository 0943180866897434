"""What the slowest rank costs, by windows of the fabric monitor: rather too little than too much."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.goodput.stragglers import CostOfStep, straggler_costs


def window(first: int, late: dict[int, float], busy: dict[int, float] | None = None) -> dict[str, Any]:
    """Four steps of a second each."""
    return {
        "first_step": first,
        "step": first + 3,
        "step_s": 1.0,
        "late_s": {str(rank): seconds for rank, seconds in late.items()},
        "busy_s": {str(rank): seconds for rank, seconds in (busy or {}).items()},
    }


def cost_ms(windows: list[dict[str, Any]], *steps: int) -> list[int]:
    cost = CostOfStep(straggler_costs(windows))
    return [cost(step) // 1000 for step in steps]


def test_the_latest_costs_what_it_is_later_than_the_second() -> None:
    windows = [window(first, {0: 0.0, 1: 0.1, 2: 0.4}) for first in (1, 5, 9)]
    assert cost_ms(windows, 0, 1, 4, 5, 12, 13) == [0, 300, 300, 300, 300, 0]
    assert {cost.rank for cost in straggler_costs(windows)} == {2}


def test_no_more_than_what_it_works_longer_than_all_others() -> None:
    late, busy = {0: 0.0, 1: 0.1, 2: 0.4}, {0: 0.5, 1: 0.6, 2: 0.8}
    assert cost_ms([window(first, late, busy) for first in (1, 5, 9)], 5) == [200]
    busy[1] = 0.9  # another one works longer: nobody waits for work of rank 2
    assert cost_ms([window(first, late, busy) for first in (1, 5, 9)], 5) == [0]


@pytest.mark.parametrize(
    "latest", [(0, 1, 0, 1), (0, 0, 1, 1), (0, 0, 1, 0)], ids=["in turns", "twice each", "not in a row"]
)
def test_what_changes_from_window_to_window_is_noise(latest: tuple[int, ...]) -> None:
    windows = [window(4 * number, {0: 0.0, 1: 0.0, 2: 0.0, rank: 0.3}) for number, rank in enumerate(latest)]
    assert straggler_costs(windows) == []


def test_what_is_small_is_noise() -> None:
    assert straggler_costs([window(first, {0: 0.0, 1: 0.019}) for first in (1, 5, 9)]) == []
    assert len(straggler_costs([window(first, {0: 0.0, 1: 0.021}) for first in (1, 5, 9)])) == 3


def test_of_steps_that_were_made_again_the_last_time_counts() -> None:
    slow, well = {0: 0.0, 1: 0.5}, {0: 0.0, 1: 0.0}
    windows = [window(first, slow) for first in (1, 5, 9, 13, 17)] + [window(first, well) for first in (14, 18)]
    assert cost_ms(windows, 4, 12, 13, 14, 17, 18) == [500, 500, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "damaged", [{}, {"first_step": 5}, {"late_s": {"a": 1}}, {"late_s": [1]}, {"step_s": None}, {"step": "x"}]
)
def test_damaged_lines_are_passed_over(damaged: dict[str, Any]) -> None:
    whole = window(5, {0: 0.0, 1: 0.4})
    broken = {key: value for key, value in whole.items() if key not in damaged} | damaged if damaged else {}
    if damaged == {"first_step": 5}:
        broken = damaged
    windows = [window(1, {0: 0.0, 1: 0.4}), broken, whole, window(9, {0: 0.0, 1: 0.4})]
    assert len(straggler_costs(windows)) == 3


def test_one_rank_waits_for_nobody() -> None:
    assert straggler_costs([window(first, {0: 0.4}) for first in (1, 5, 9)]) == []
