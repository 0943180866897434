"""What a simulated fabric answers, with each fault and without."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.fabric.probing import UnresponsiveError
from cluster.fabric.simulation.fabric import Noise, SimulatedFabric, draw_noise
from cluster.fabric.simulation.faults import Fault, LinkFault
from cluster.fabric.simulation.topology import Topology, fat_tree, two_leaves

SILENT = Noise(rate=0, unfairness=0, compute=0, round_trip=0, outliers=0, drift=0, unequal=0)
NUM_BYTES = 10**6


def _fabric(topology: Topology, *faults: Fault, noise: Noise = SILENT, seed: int = 0) -> SimulatedFabric:
    return SimulatedFabric(topology, faults, noise=noise, seed=seed)


def _degraded(*links: LinkFault) -> Fault:
    return Fault(injection="slow_link", expected="slow_link", keep=0.5, endpoint=2, links=links)


def _shares(fabric: SimulatedFabric, topology: Topology, *flows: tuple[int, int]) -> list[float]:
    rates = fabric.transfer(np.array(flows), num_bytes=int(topology.host_rate))
    return [round(rate / topology.host_rate, 2) for rate in rates.tolist()]


def test_a_healthy_fabric_gives_every_disjoint_pair_the_speed_of_a_link() -> None:
    topology = two_leaves()
    flows = [(sender, (sender + 4) % 8) for sender in range(8)]
    assert _shares(_fabric(topology), topology, *flows) == [1.0] * 8


def test_a_slow_sender_is_slow_out_and_not_in() -> None:
    topology = two_leaves()
    fabric = _fabric(topology, _degraded(LinkFault(link=topology.out_of(2), keep=0.5)))
    assert _shares(fabric, topology, (2, 3), (3, 2), (0, 1)) == [0.5, 1.0, 1.0]


def test_a_bad_pair_is_slow_one_way_alone() -> None:
    topology = two_leaves()
    fault = Fault(injection="bad_path", expected="bad_path", keep=0.4, endpoint=2, pairs=((2, 5),))
    assert _shares(_fabric(topology, fault), topology, (2, 5), (5, 2), (3, 4)) == [0.4, 1.0, 1.0]
    assert _shares(_fabric(topology, fault), topology, (2, 4)) == [1.0]


def test_a_congested_uplink_shows_under_load_alone() -> None:
    topology = two_leaves()
    fabric = _fabric(topology, _degraded(LinkFault(link=topology.cable(0, 0)[0], keep=0.5, queue_round_trips=10)))
    assert _shares(fabric, topology, (0, 4), (1, 2)) == [1.0, 1.0]
    assert _shares(fabric, topology, (0, 4), (1, 5), (2, 6), (3, 7), (4, 0)) == [0.5] * 4 + [1.0]
    within, across = fabric.round_trip(np.array([[0, 1], [0, 4]]), repeats=3)
    assert across > 3 * within


def test_a_slow_host_needs_longer_for_the_same_work() -> None:
    fault = Fault(injection="slow_host", expected="slow_host", keep=0.5, endpoint=3, compute_keep=0.5)
    seconds = _fabric(two_leaves(), fault).compute([1, 3], work_s=0.05)
    assert seconds.tolist() == pytest.approx([0.05, 0.1])


def test_a_missing_rank_answers_until_it_dies_and_is_named_then() -> None:
    fault = Fault(injection="missing_rank", expected="missing_rank", keep=0, endpoint=3, missing_from_call=1)
    fabric = _fabric(two_leaves(), fault)
    fabric.transfer(np.array([[3, 1]]), num_bytes=NUM_BYTES)
    fabric.transfer(np.array([[2, 1]]), num_bytes=NUM_BYTES)
    with pytest.raises(UnresponsiveError) as raised:
        fabric.transfer(np.array([[2, 1], [4, 3]]), num_bytes=NUM_BYTES)
    assert raised.value.ranks == (3,)
    with pytest.raises(UnresponsiveError, match="compute"):
        fabric.compute(range(8), work_s=0.1)


def test_hashed_flows_of_a_healthy_fat_tree_share_cables() -> None:
    topology = fat_tree(1024)
    flows = np.stack([np.arange(1024), (np.arange(1024) + 512) % 1024], axis=1)
    rates = _fabric(topology).transfer(flows, num_bytes=int(topology.host_rate)) / topology.host_rate
    assert np.median(rates) < 0.6
    alone = [_shares(_fabric(topology), topology, (n, n + 512)) for n in range(20)]
    assert alone == [[1.0]] * 20


def test_noise_outliers_and_drift_are_as_large_as_they_say() -> None:
    noise = Noise(rate=0.04, unfairness=0, compute=0.02, round_trip=0.1, outliers=0.05, drift=0.05, unequal=0)
    topology = fat_tree(64)
    fabric = _fabric(topology, noise=noise, seed=5)
    flows = np.array([[sender, sender ^ 1] for sender in range(64)])
    logs = np.log([fabric.transfer(flows, num_bytes=int(topology.host_rate)) for _ in range(400)])
    calls = np.median(logs, axis=1)
    assert np.std(calls) == pytest.approx(0.05, rel=0.3)
    within = logs - calls[:, None]
    assert np.quantile(within, 0.84) == pytest.approx(0.04, rel=0.15)
    assert (within < -0.2).mean() == pytest.approx(0.044, rel=0.2), "most outliers lose more than a fifth"
    assert np.corrcoef(calls[1:], calls[:-1])[0, 1] > 0.6, "drift lasts"


def test_short_transfers_are_measured_less_precisely() -> None:
    topology = two_leaves()
    fabric = _fabric(topology, noise=SILENT)
    flows = np.array([[0, 1], [2, 3], [4, 5], [6, 7]])
    short = np.log([fabric.transfer(flows, num_bytes=10_000) for _ in range(50)])
    long = np.log([fabric.transfer(flows, num_bytes=10**6) for _ in range(50)])
    assert np.std(short) > 10 * np.std(long)


def test_the_same_questions_get_the_same_answers() -> None:
    topology = two_leaves()
    noise = draw_noise(np.random.default_rng(0), topology)
    answers = [
        _fabric(topology, noise=noise, seed=seed).transfer(np.array([[0, 1]]), num_bytes=NUM_BYTES)[0]
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_the_clock_runs_as_long_as_the_slowest_flow() -> None:
    topology = two_leaves()
    fabric = _fabric(topology, _degraded(LinkFault(link=topology.out_of(2), keep=0.25)))
    fabric.transfer(np.array([[2, 3], [3, 2]]), num_bytes=int(topology.host_rate))
    assert fabric.seconds == pytest.approx(4.0, rel=0.05)


def test_leaves_are_told_only_where_they_are_known() -> None:
    told = SimulatedFabric(two_leaves(), (), noise=SILENT, seed=0, leaves_known=True)
    hidden = SimulatedFabric(two_leaves(), (), noise=SILENT, seed=0, leaves_known=False)
    assert {endpoint.leaf for endpoint in told.endpoints} == {"leaf-0", "leaf-1"}
    assert {endpoint.leaf for endpoint in hidden.endpoints} == {None}
    assert list(hidden.counters()) == [{}] * 8
