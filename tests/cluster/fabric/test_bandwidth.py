"""Bandwidths against lines that nccl-tests printed, and the fit of alpha and beta against known ones."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cluster.fabric.bandwidth import (
    AlphaBeta,
    bandwidth,
    bus_factor,
    fit_alpha_beta,
    message_steps,
    size_in_use,
)
from cluster.fabric.statistics import student_quantile

ALPHA, BETA = 12e-6, 1 / 40e9
SIZES = [4**power for power in range(5, 14)]

# Collective, ranks, and one printed line: size (B), time (us), algbw (GB/s), busbw (GB/s). From public reports:
# kvcache-ai/Mooncake#3484, coreweave/nccl-tests#43, NVIDIA/nccl#1161, NVIDIA/nccl#2169, NVIDIA/nccl-tests#78, ROCm/rccl#2075
# (whose gather and scatter share the factor of all_gather and reduce_scatter), NVIDIA/nccl-tests#104.
PRINTED = [
    ("all_reduce", 8, 1048576, 27.76, 37.78, 66.11),
    ("all_reduce", 8, 33554432, 195.40, 171.72, 300.51),
    ("all_reduce", 72, 1073741824, 3108.8, 345.38, 681.17),
    ("all_reduce", 2, 1073741824, 9306.7, 115.37, 115.37),
    ("all_to_all", 4, 524288000, 1174.14, 446.53, 334.90),
    ("all_to_all", 64, 268435456, 520935, 0.52, 0.51),
    ("scatter", 2, 4096, 11.64, 0.35, 0.18),
    ("broadcast", 2, 1048576, 151.9, 6.90, 6.90),
    ("send_recv", 2, 37748736, 6485.7, 5.82, 5.82),
]


@pytest.mark.parametrize(("kind", "ranks", "size", "time_us", "algbw", "busbw"), PRINTED)
def test_bandwidths_are_those_that_nccl_tests_print(
    kind: str, ranks: int, size: int, time_us: float, algbw: float, busbw: float
) -> None:
    found = bandwidth(kind, size, ranks, time_us * 1e-6)
    # Times are printed with four to six digits, bandwidths with two decimals.
    assert found.algbw_bytes_per_s / 1e9 == pytest.approx(algbw, abs=0.0051, rel=2e-4)
    assert found.busbw_bytes_per_s / 1e9 == pytest.approx(busbw, abs=0.0051, rel=2e-4)


@pytest.mark.parametrize(
    ("kind", "factor"),
    [
        ("all_reduce", 1.75),
        ("all_gather", 0.875),
        ("reduce_scatter", 0.875),
        ("all_to_all", 0.875),
        ("gather", 0.875),
        ("scatter", 0.875),
        ("broadcast", 1.0),
        ("reduce", 1.0),
        ("send_recv", 1.0),
    ],
)
def test_the_factor_of_eight_ranks_is_that_of_the_source_of_nccl_tests(kind: str, factor: float) -> None:
    assert bus_factor(kind, 8) == factor


def test_a_collective_without_a_bus_bandwidth_is_refused() -> None:
    with pytest.raises(ValueError, match="'barrier' has no bus bandwidth: known are all_gather, all_reduce"):
        bus_factor("barrier", 8)


@pytest.mark.parametrize(
    ("kind", "asked", "ranks", "element", "size"),
    [
        ("all_reduce", 1000, 3, 4, 1000),
        ("all_reduce", 1001, 3, 4, 1000),
        ("broadcast", 1001, 8, 2, 1000),
        ("all_gather", 1024, 8, 4, 1024),
        ("all_gather", 1000, 8, 4, 896),  # 250 elements, 31 a rank, 28 of them in whole 16 bytes
        ("reduce_scatter", 1 << 20, 3, 4, 1048560),
        ("all_to_all", 1000, 8, 2, 896),
        ("all_to_all", 8, 8, 4, 128),  # nccl-tests would run it with nothing: the least that can be shared out
        ("send_recv", 3, 8, 4, 4),
    ],
)
def test_sizes_are_rounded_as_nccl_tests_round_them(kind: str, asked: int, ranks: int, element: int, size: int) -> None:
    assert size_in_use(kind, asked, ranks, element) == size


def test_messages_of_ring_and_tree() -> None:
    assert [message_steps("all_reduce", 8, way) for way in ("ring", "tree")] == [14, 6]
    assert [message_steps("all_gather", 6, way) for way in ("ring", "tree")] == [5, 3]
    assert [message_steps("all_to_all", 8, way) for way in ("ring", "tree")] == [7, 7]
    assert message_steps("send_recv", 8) == 1


def _time(kind: str, ranks: int, size: int) -> float:
    return message_steps(kind, ranks) * ALPHA + bus_factor(kind, ranks) * size * BETA


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "broadcast", "send_recv"])
def test_a_ring_without_noise_gives_back_its_alpha_and_beta(kind: str) -> None:
    model = fit_alpha_beta(kind, 6, SIZES, [_time(kind, 6, size) for size in SIZES])
    assert model is not None
    assert model.alpha_s.value == pytest.approx(ALPHA)
    assert model.beta_s_per_byte.value == pytest.approx(BETA)
    assert model.seconds(1 << 20).value == pytest.approx(_time(kind, 6, 1 << 20))
    assert model.seconds(3 << 20, count=3).value == pytest.approx(3 * _time(kind, 6, 1 << 20))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(11)
    tries, held = 400, {"alpha": 0, "beta": 0, "time": 0}
    size = 64 << 10  # where both matter
    for _ in range(tries):
        noisy = [_time("all_reduce", 8, each) * rng.lognormal(0, 0.05) for each in SIZES]
        model = fit_alpha_beta("all_reduce", 8, SIZES, noisy)
        assert model is not None
        time = model.seconds(size)
        for name, interval, truth in (
            ("alpha", model.alpha_s, ALPHA),
            ("beta", model.beta_s_per_byte, BETA),
            ("time", time, _time("all_reduce", 8, size)),
        ):
            assert interval.low is not None
            assert interval.high is not None
            held[name] += interval.low <= truth <= interval.high
    assert all(0.91 <= share / tries <= 0.98 for share in held.values()), held


def test_the_interval_of_a_time_knows_that_alpha_and_beta_err_against_each_other() -> None:
    """As wide as predictions really scatter: with independent errors it would be a tenth wider."""
    rng = np.random.default_rng(1)
    size, truth, found, reaches = 4 << 20, _time("all_reduce", 8, 4 << 20), [], []
    for _ in range(600):
        noisy = [_time("all_reduce", 8, each) * rng.lognormal(0, 0.05) for each in SIZES]
        model = fit_alpha_beta("all_reduce", 8, SIZES, noisy)
        assert model is not None
        time = model.seconds(size)
        assert time.reach is not None
        found.append(time.value)
        reaches.append(time.reach)
    scatter = student_quantile(0.025, len(SIZES) - 2) * np.std(found)
    assert np.mean(found) == pytest.approx(truth, rel=0.01)
    assert np.sqrt(np.mean(np.square(reaches))) == pytest.approx(scatter, rel=0.06)


def test_small_times_count_as_much_as_large_ones() -> None:
    """Noise is a share of a time: unweighted, 5 % of the largest would swamp every latency."""
    rng = np.random.default_rng(5)
    found = []
    for _ in range(50):
        times = [_time("all_reduce", 8, size) * rng.lognormal(0, 0.05) for size in SIZES]
        model = fit_alpha_beta("all_reduce", 8, SIZES, times)
        assert model is not None
        found.append(model.alpha_s.value)
    assert np.std(found) < 0.05 * ALPHA


def test_neither_is_ever_below_zero() -> None:
    falling = fit_alpha_beta("send_recv", 2, [1024, 4096, 16384], [3e-5, 2e-5, 1e-5])
    assert falling is not None
    assert falling.beta_s_per_byte.value == 0
    assert falling.alpha_s.value > 0
    steep = fit_alpha_beta("send_recv", 2, [1024, 4096, 16384], [1e-6, 8e-6, 64e-6])
    assert steep is not None
    assert steep.alpha_s.value == 0
    assert steep.beta_s_per_byte.value > 0


def test_two_sizes_give_a_line_without_an_interval_and_fewer_give_none() -> None:
    sizes = [1024, 1 << 20]
    model = fit_alpha_beta("all_reduce", 4, sizes, [_time("all_reduce", 4, size) for size in sizes])
    assert model is not None
    assert model.alpha_s.value == pytest.approx(ALPHA)
    assert model.alpha_s.low is None
    assert model.seconds(4096).high is None
    assert not math.isinf(model.residual_share)
    assert fit_alpha_beta("all_reduce", 4, [1024, 1024], [1e-3, 1e-3]) is None
    assert fit_alpha_beta("all_reduce", 1, sizes, [1e-3, 2e-3]) is None


def test_a_model_survives_json() -> None:
    model = fit_alpha_beta("all_reduce", 4, SIZES, [_time("all_reduce", 4, size) for size in SIZES])
    assert model is not None
    assert AlphaBeta.from_data(model.as_data()) == model
