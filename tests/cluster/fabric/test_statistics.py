"""Statistics against published values, against truth that was put in, and against noise alone."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.fabric.statistics import (
    change_points,
    contrast,
    least_squares,
    noise_from_repeats,
    robust_spread,
    student_quantile,
    student_tail,
)


@pytest.mark.parametrize(
    ("tail", "dof", "quantile"),
    [(0.025, 1, 12.706205), (0.025, 10, 2.228139), (0.005, 4, 4.604095), (0.05, 30, 1.697261)],
)
def test_students_t_agrees_with_the_printed_tables(tail: float, dof: float, quantile: float) -> None:
    assert student_quantile(tail, dof) == pytest.approx(quantile, rel=1e-5)
    assert student_tail(quantile, dof) == pytest.approx(tail, rel=1e-4)
    assert student_tail(-quantile, dof) == pytest.approx(1 - tail, rel=1e-4)


def test_a_quantile_of_an_impossible_tail_is_refused() -> None:
    with pytest.raises(ValueError, match="tail must lie above 0"):
        student_quantile(0.7, 3)


def test_spread_and_noise_are_those_put_in_whatever_the_outliers() -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(0.0, 0.03, 4000)
    values[:200] += 1.0
    assert robust_spread(values) == pytest.approx(0.03, rel=0.1)
    levels = np.repeat(rng.normal(0.0, 1.0, 1000), 3)
    noisy = levels + rng.normal(0.0, 0.03, 3000)
    assert noise_from_repeats(noisy, np.repeat(np.arange(1000), 3)) == pytest.approx(0.03, rel=0.25)
    assert np.isnan(noise_from_repeats(noisy[:3], np.arange(3)))


def test_a_contrast_of_few_values_that_agree_by_chance_is_not_believed() -> None:
    agreeing = contrast([0.101, 0.100, 0.102])
    assert agreeing.tail_beyond(0.0) < 1e-3
    assert contrast([0.101, 0.100, 0.102], known_spread=0.08, known_dof=6).tail_beyond(0.0) > 0.01
    assert contrast([0.4]).tail_beyond(0.0) == 1.0


def test_contrasts_of_noise_alone_err_no_more_often_than_they_say() -> None:
    rng = np.random.default_rng(8)
    wrong = sum(contrast(rng.normal(0.0, 1.0, 6)).tail_beyond(0.0) < 0.01 for _ in range(2000))
    assert wrong <= 35


def test_least_squares_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    sizes = np.geomspace(1e3, 1e8, 12)
    design = np.stack([np.ones_like(sizes), sizes], axis=1)
    covered = 0
    for _ in range(400):
        truth = np.array([2e-5, 1e-9])
        times = design @ truth
        measured = times * (1 + rng.normal(0.0, 0.03, sizes.size))
        fit = least_squares(design, measured, 1 / times**2)
        covered += int(np.sum((fit.low <= truth) & (truth <= fit.high)))
    assert covered / 800 == pytest.approx(0.95, abs=0.03)


def test_least_squares_refuses_a_design_that_determines_nothing() -> None:
    with pytest.raises(ValueError, match="do not determine 2 coefficients"):
        least_squares(np.ones((5, 2)), np.ones(5))


@pytest.mark.parametrize("effect", [1.2, 0.8])
def test_a_lasting_change_is_found_where_it_is(effect: float) -> None:
    found = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        series = np.exp(rng.normal(0.0, 0.03, 60))
        series[rng.random(60) < 0.03] *= 2.0
        series[40:] *= effect
        changes = change_points(series)
        found += len(changes) == 1 and abs(changes[0].index - 40) <= 1 and abs(changes[0].effect - effect + 1) < 0.06
    assert found >= 97


def test_noise_outliers_short_blips_and_small_changes_are_no_change() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        series = np.exp(rng.normal(0.0, 0.04, int(rng.integers(8, 80))))
        series[rng.random(series.size) < 0.03] *= 2.0
        assert change_points(series) == (), f"seed {seed}"
    steady = 1 + 0.01 * np.sin(np.arange(50.0))
    blip = steady.copy()
    blip[20:22] *= 3
    small = steady.copy()
    small[25:] *= 1.07
    assert change_points(blip) == ()
    assert change_points(small) == ()
    assert change_points([1.0, 1.0, 5.0]) == ()


def test_two_changes_are_both_found() -> None:
    rng = np.random.default_rng(1)
    series = np.exp(rng.normal(0.0, 0.02, 60)) * np.repeat([1.0, 1.3, 1.0], 20)
    changes = change_points(series)
    assert [change.index for change in changes] == [20, 40]
    assert changes[0].effect == pytest.approx(0.3, abs=0.04)
    assert changes[0].before == pytest.approx(1.0, abs=0.03)


def test_a_series_that_touches_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="above zero"):
        change_points([1.0, 0.0, 1.0])
