"""Rates of trains: from the receiver's clock alone, robust to one late stamp, never too fast."""

import numpy as np
import pytest

from cluster.fabric.measured.trains import plan_train, rate_of
from cluster.fabric.measured.transport import Train

RATE = 6.25e6  # 50 Mbit/s


def _stamps(train: Train, *, begin: float, start: float) -> list[float]:
    """A receiver that is ready at `begin`, and a train at RATE whose first byte comes at `start`."""
    arrivals = start + train.chunk_bytes / RATE * np.arange(1, train.num_warmup + train.num_chunks + 1)
    return [begin, *arrivals[train.num_warmup - 1 :].tolist()]


@pytest.mark.parametrize("num_bytes", [1, 20_000, 262_144, 625_000, 10**9])
def test_a_train_times_at_least_the_bytes_asked_for_in_few_chunks(num_bytes: int) -> None:
    train = plan_train(num_bytes)
    assert num_bytes <= train.chunk_bytes * train.num_chunks < num_bytes + 16
    assert 2 <= train.num_chunks <= 16
    assert 1 <= train.num_warmup <= train.num_chunks / 2


def test_nothing_to_send_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        plan_train(0)


@pytest.mark.parametrize("clock", [0.0, -7000.0, 1e6])
@pytest.mark.parametrize("late_start", [0.0, 0.003, 0.05])
def test_neither_the_clock_nor_who_started_first_matters(clock: float, late_start: float) -> None:
    train = plan_train(625_000)
    assert rate_of(_stamps(train, begin=clock, start=clock + late_start), train) == pytest.approx(RATE, rel=1e-4)


def test_one_late_stamp_weighs_less_than_between_first_and_last() -> None:
    train = plan_train(625_000)
    stamps = _stamps(train, begin=0.0, start=0.001)
    stamps[-1] += 0.010
    naive = train.chunk_bytes * train.num_chunks / (stamps[-1] - stamps[1])
    assert abs(rate_of(stamps, train) / RATE - 1) < 0.7 * abs(naive / RATE - 1)


def test_chunks_that_were_there_before_anybody_looked_count_from_the_beginning() -> None:
    train = plan_train(160_000)
    stamps = [0.0] + [0.020 + 1e-6 * number for number in range(train.num_chunks + 1)]
    whole = train.chunk_bytes * (train.num_warmup + train.num_chunks)
    assert rate_of(stamps, train) == pytest.approx(whole / stamps[-1])
