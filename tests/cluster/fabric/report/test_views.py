from typing import Any

import numpy as np
import pytest

from cluster.fabric.report.views import (
    MOST_HOSTS,
    MOST_LEAVES,
    Pairs,
    compute_of,
    curves_of,
    fabric_of,
    pairs_of,
    short_names,
    slowest_part,
    waits_of,
)
from tests.cluster.fabric.report import samples
from tests.cluster.fabric.report.samples import finding

GB = 1e9


def _large(*findings: dict[str, Any], leaves: int = 32, per_leaf: int = 32) -> dict[str, Any]:
    hosts = [f"n{number}" for number in range(leaves * per_leaf)]
    groups = [hosts[start : start + per_leaf] for start in range(0, len(hosts), per_leaf)]
    return {"findings": list(findings), "details": {"hosts": hosts, "groups": groups}}


def test_heat_grows_as_pairs_are_slower_than_the_median() -> None:
    rates = GB * np.array(
        [[np.nan, 1.0, 1.0, 1.2], [0.96, np.nan, 1, 0.92], [0.85, 0.7, np.nan, 1], [0.55, 0.4, 0.1, 1]]
    )
    pairs = Pairs(names=("a", "b", "c", "d"), rates=rates)
    assert pairs.median == 0.96 * GB
    assert pairs.heat().tolist() == [[-1, 0, 0, 0], [0, -1, 0, 0], [2, 3, -1, 0], [4, 5, 6, 0]]


def test_pairs_come_from_a_verdict_that_has_them() -> None:
    pairs = pairs_of(samples.verdict())
    assert pairs is not None
    assert pairs.names == samples.HOSTS
    assert np.isnan(np.diagonal(pairs.rates)).all()
    assert np.argmin(np.nanmedian(pairs.rates, axis=1)) == 3
    assert pairs_of(None) is None
    assert pairs_of({"details": {"hosts": ["a", "b"], "pairs_bytes_per_s": [[None, None], [None, None]]}}) is None


def test_of_many_hosts_the_slowest_are_kept() -> None:
    rates = np.full((20, 20), np.nan)
    rates[np.arange(20), np.roll(np.arange(20), 1)] = 10.0
    rates[7] *= 0.5  # sends slowly
    rates[3, 15] = 2.0  # a path
    part = slowest_part(Pairs(names=tuple(f"n{number}" for number in range(20)), rates=rates), 4)
    assert part.names == ("n3", "n6", "n7", "n15")
    assert part.rates[2, 1] == 5.0


def test_the_topology_marks_hosts_and_paths() -> None:
    found = (samples.SLOW_SENDER, samples.BAD_PATH, samples.SLOW_HOST, samples.STRAGGLER)
    fabric = fabric_of(samples.verdict(*found))
    assert fabric is not None
    assert [leaf.hosts for leaf in fabric.leaves] == [samples.HOSTS[:4], samples.HOSTS[4:]]
    assert fabric.marks == {"h3": ("slow_sender",), "h5": ("slow_host",)}
    assert fabric.paths == (("h1", "h6"),)
    assert not any(leaf.congested for leaf in fabric.leaves)


@pytest.mark.parametrize(
    ("evidence", "congested"),
    [
        ({}, [{"out", "in"}, {"out", "in"}]),
        ({"from_hosts": samples.HOSTS[:4], "to_hosts": samples.HOSTS[4:]}, [{"out"}, {"in"}]),
        (
            {"from_hosts": samples.HOSTS[:4], "to_hosts": samples.HOSTS[4:], "both_ways": True},
            [{"out", "in"}, {"out", "in"}],
        ),
    ],
)
def test_a_congested_uplink_is_marked_in_its_direction(evidence: dict[str, Any], congested: list[set[str]]) -> None:
    fabric = fabric_of(samples.verdict(finding("congested_uplink", samples.HOSTS, "congested", **evidence)))
    assert fabric is not None
    assert [set(leaf.congested) for leaf in fabric.leaves] == congested


def test_without_known_switches_a_congested_uplink_tells_the_two_sides() -> None:
    crossing = finding(
        "congested_uplink", samples.HOSTS[:6], "congested", from_hosts=["h0", "h1"], to_hosts=["h4", "h5"]
    )
    verdict = samples.verdict(crossing)
    del verdict["details"]["groups"]
    fabric = fabric_of(verdict)
    assert fabric is not None
    assert [leaf.hosts for leaf in fabric.leaves] == [("h0", "h1"), ("h4", "h5"), ("h2", "h3", "h6", "h7")]
    assert [leaf.name for leaf in fabric.leaves] == ["leaf 0", "leaf 1", "elsewhere"]


def test_without_any_hint_there_is_one_switch_with_each_host_once() -> None:
    verdict = samples.verdict()
    del verdict["details"]["groups"]
    verdict["details"]["hosts"] += ["h0", "h1"]  # two rails of one host
    fabric = fabric_of(verdict)
    assert fabric is not None
    assert [(leaf.name, leaf.hosts) for leaf in fabric.leaves] == [("switch", samples.HOSTS)]


def test_a_host_that_never_came_is_drawn_too() -> None:
    fabric = fabric_of(samples.verdict(finding("missing_rank", ("h9",), "h9 never came.")))
    assert fabric is not None
    assert fabric.leaves[-1].hosts == ("h9",)
    assert fabric.marks == {"h9": ("missing_rank",)}


def test_of_a_large_fabric_the_leaves_and_hosts_with_findings_are_shown() -> None:
    fabric = fabric_of(
        _large(
            finding("slow_link", ("n1000",), "slow"),
            finding("bad_path", ("n40", "n600"), "bad"),
            finding("congested_uplink", tuple(f"n{number}" for number in range(64, 96)), "congested"),
        )
    )
    assert fabric is not None
    assert len(fabric.leaves) == MOST_LEAVES
    assert len(fabric.hosts) == MOST_HOSTS
    assert fabric.num_hidden_leaves == 32 - MOST_LEAVES
    assert {"n1000", "n40", "n600"} <= set(fabric.hosts)
    assert all(leaf.num_hidden + len(leaf.hosts) == 32 for leaf in fabric.leaves)
    assert [leaf.name for leaf in fabric.leaves if leaf.congested] == ["leaf 2"]


def test_curves_are_by_group_and_sorted_by_size() -> None:
    sweep = samples.sweep()
    sweep["rows"].reverse()
    curves = curves_of(sweep)
    assert sorted(curves) == ["tp", "world"]
    assert len(curves["world"]) == 8
    assert all(list(curve.sizes) == sorted(curve.sizes) for curve in curves["world"])
    assert curves_of(None) == {}


def test_compute_times_come_by_host_or_in_the_order_of_hosts() -> None:
    assert compute_of({"details": {"hosts": ["a", "b"], "compute_s": {"a": 1.0, "b": None}}}) == {"a": 1.0}
    assert compute_of({"details": {"hosts": ["a", "b"], "compute_s": [1.0, 2.0]}}) == {"a": 1.0, "b": 2.0}
    assert compute_of(None) == {}


def test_the_timeline_has_gaps_where_nothing_was_recorded() -> None:
    records = [
        {"step": 20, "wait_s": {"tp": 0.2}, "late_s": {"10": 0.1}},
        {"step": 10, "wait_s": {"tp": 0.1, "pp": 0.3}, "late_s": {"2": 0.4, "10": 0.0}},
    ]
    timeline = waits_of(records, samples.verdict(samples.STRAGGLER, samples.SLOW_SENDER))
    assert timeline is not None
    assert timeline.onsets == ((120, "rank 5"),)
    assert timeline.network == {}
    assert timeline.steps == (10, 20)
    assert timeline.by_axis["tp"] == (0.1, 0.2)
    assert np.isnan(timeline.by_axis["pp"][1])
    assert timeline.ranks == (2, 10)
    np.testing.assert_array_equal(timeline.late, [[0.4, np.nan], [0.0, 0.1]])
    assert waits_of([]) is None


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["h0", "h1"], ["h0", "h1"]),
        (["n1.cluster.local", "n2.cluster.local"], ["n1", "n2"]),
        (["n1.east", "n1.west"], ["n1.east", "n1.west"]),
        (["gpu-node-0001", "gpu-node-0002"], ["0001", "0002"]),
        (["gpu-node-0001"], ["gpu-node-0001"]),
        ([], []),
    ],
)
def test_names_are_as_short_as_they_can_be(names: list[str], short: list[str]) -> None:
    assert list(short_names(names).values()) == short
