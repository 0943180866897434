"""What was seen of each sender and receiver."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.fabric.wide.evidence import Ends


@pytest.fixture
def ends() -> Ends:
    seen = Ends(4)
    seen.add(np.array([[0, 1], [2, 3]]), np.array([-0.1, -0.5]))
    seen.add(np.array([[0, 3]]), np.array([-0.3]))
    return seen


def test_senders_and_receivers_are_seen_apart(ends: Ends) -> None:
    assert ends.seen(0).tolist() == [2, 0, 1, 0]
    assert ends.seen(1).tolist() == [0, 1, 0, 2]
    assert ends.samples(1, 3).tolist() == [-0.5, -0.3]
    assert ends.samples(1, 3, since=1).tolist() == [-0.3]


def test_means_and_ranks_over_rounds(ends: Ends) -> None:
    assert ends.means(0)[[0, 2]] == pytest.approx([-0.2, -0.5])
    assert np.isnan(ends.means(0)[1])
    assert ends.best(0).tolist() == [-0.1, -np.inf, -0.5, -np.inf]
    assert ends.best(0, rank=2)[0] == -0.3
    assert ends.best(0, rank=3)[0] == -np.inf


def test_an_outlier_counts_for_no_more_than_e_times_slower() -> None:
    ends = Ends(2)
    ends.add(np.array([[0, 1]]), np.array([-7.0]))
    assert ends.samples(0, 0).tolist() == [-1.0]
