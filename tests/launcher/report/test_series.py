"""Curves from lines of metrics, however many there are, and whatever stands in them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from launcher.report.series import MetricSeries, thinned


def filled(*lines: dict[str, Any]) -> MetricSeries:
    series = MetricSeries()
    assert list(series.watch(iter(lines))) == list(lines)
    return series


def test_a_short_curve_is_as_it_is() -> None:
    curve = filled(*({"step": step, "loss": 1.0 / step} for step in (1, 2, 3))).curve("loss")
    assert curve is not None
    assert curve.steps.tolist() == [1, 2, 3]
    assert curve.mean.tolist() == [1.0, 1 / 2, 1 / 3]
    assert not curve.is_thinned


def test_a_long_curve_keeps_its_means_and_its_extremes() -> None:
    steps = np.arange(1.0, 100_001.0)
    values = np.sin(steps)
    values[77_777] = 9.0
    curve = thinned(steps, values)
    assert curve is not None
    assert len(curve.steps) == 500
    assert curve.is_thinned
    assert float(curve.high.max()) == 9.0
    assert float(np.mean(curve.mean)) == pytest.approx(values.mean(), abs=1e-6)
    assert np.all(np.diff(curve.steps) > 0)
    assert np.all((curve.low <= curve.mean) & (curve.mean <= curve.high))


def test_what_is_no_number_is_left_out() -> None:
    series = filled(
        {"step": 1, "loss": None},
        {"step": 2, "loss": 3.0, "mfu": None},
        {"step": 3, "loss": "x"},
        {"step": "4", "loss": 1},
    )
    curve = series.curve("loss")
    assert curve is not None
    assert curve.mean.tolist() == [3.0]
    assert series.curve("mfu") is None
    assert (series.last("loss"), series.last("mfu"), series.usual("mfu"), series.most("mfu")) == (3.0, None, None, None)
    assert filled().curve("loss") is None


def test_some_steps_may_be_left_out() -> None:
    curve = filled(*({"step": step, "loss": float(step)} for step in (1, 2, 3))).curve("loss", without=[1, 3])
    assert curve is not None
    assert curve.steps.tolist() == [2]


def test_steps_in_disorder_are_put_in_order() -> None:
    curve = thinned(np.array([3.0, 1.0, 2.0]), np.array([30.0, 10.0, 20.0]))
    assert curve is not None
    assert (curve.steps.tolist(), curve.mean.tolist()) == ([1, 2, 3], [10, 20, 30])


def test_validations_stand_apart() -> None:
    series = filled({"step": 1, "loss": 2.0}, {"step": 1, "val_loss": 2.5, "val_bits_per_byte": 0.9})
    assert len(series) == 1
    assert series.last("val_bits_per_byte") == 0.9
    held_out = series.validation("val_loss")
    assert held_out is not None
    assert held_out.mean.tolist() == [2.5]


def test_the_balance_of_experts() -> None:
    series = filled(
        {"step": 1, "loss": 2.0, "expert_counts": [[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0]]},
        {"step": 2, "loss": 2.0, "expert_counts": "damaged"},
        {"step": 3, "loss": 2.0, "expert_counts": [[0, 0], [7]]},
    )
    (first, balance), (third, odd) = series.balances
    assert (first, third) == (1, 3)
    assert balance == pytest.approx((1.0, 0.0, 0.5))
    assert odd == (1.0, 1.0)


def test_of_many_balances_some_are_kept() -> None:
    series = filled(*({"step": step, "loss": 1.0, "expert_counts": [[1, 2]]} for step in range(1, 20_001)))
    steps = [step for step, _ in series.balances]
    assert 256 <= len(steps) <= 1024
    assert len({later - earlier for earlier, later in pairwise(steps)}) == 1
    assert steps[-1] > 19_900


def test_a_median_of_the_newest() -> None:
    series = filled(*({"step": step, "loss": 1.0, "mfu": 0.1 if step < 50 else 0.5} for step in range(1, 101)))
    assert series.usual("mfu", newest=20) == 0.5
    assert series.most("mfu") == 0.5
    assert math.isnan(series.steps["memory_bytes"][0])
