"""Max-min fair shares, by hand where that is possible and by their definition where it is not."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.fabric.simulation.sharing import max_min_shares


def test_a_flow_alone_gets_its_narrowest_link() -> None:
    shares = max_min_shares(np.array([[0, 1]]), np.array([5.0, 3.0, np.inf]))
    assert shares.rates.tolist() == [3.0]
    assert shares.shared.tolist() == [False]


def test_what_a_bounded_flow_leaves_goes_to_the_others() -> None:
    # Flows 0 and 1 share link 0 of 10; flow 1 also shares link 1 of 6 with flow 2 and 3, and gets 2 there.
    shares = max_min_shares(np.array([[0, 2], [0, 1], [2, 1], [1, 2]]), np.array([10.0, 6.0, np.inf]))
    assert shares.rates.tolist() == [8.0, 2.0, 2.0, 2.0]
    assert shares.shared.tolist() == [True, True, True, True]


def test_no_flow_is_no_share() -> None:
    assert max_min_shares(np.zeros((0, 3), dtype=int), np.array([1.0])).rates.shape == (0,)


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_max_min_fair(seed: int) -> None:
    """No link carries more than it can, and every flow has a full link on which nobody gets more than it."""
    rng = np.random.default_rng(seed)
    capacities = np.append(rng.uniform(1, 10, 30), np.inf)
    routes = rng.integers(0, 31, (200, 4))
    routes[:, 0] = rng.integers(0, 30, 200)
    # A flow crosses a link once: repeated ones are made "no link".
    for flow in routes:
        _, first = np.unique(flow, return_index=True)
        flow[[place for place in range(4) if place not in first]] = 30
    rates = max_min_shares(routes, capacities).rates
    load = np.bincount(routes.reshape(-1), weights=np.repeat(rates, 4), minlength=31)
    assert (load[:-1] <= capacities[:-1] * (1 + 1e-9)).all(), f"seed {seed}"
    fastest = np.zeros(31)
    np.maximum.at(fastest, routes.reshape(-1), np.repeat(rates, 4))
    full = load >= capacities * (1 - 1e-9)
    bottleneck = full[routes] & (rates[:, None] >= fastest[routes] * (1 - 1e-9))
    assert bottleneck.any(1).all(), f"seed {seed}"
