"""Diagnosis of simulated fabrics too wide to measure every pair. Fixed seeds; the full campaigns are a benchmark."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.fabric.diagnose import diagnose
from cluster.fabric.simulation.campaign import SimulatedCase, SimulationPlan, make_situation, score, simulate
from cluster.fabric.simulation.fabric import Noise, SimulatedFabric
from cluster.fabric.simulation.faults import Fault, LinkFault
from cluster.fabric.simulation.topology import fat_tree

MOST_ROUNDS = 12
SINGLE_FAULTS = [
    "slow_host",
    "slow_sender",
    "slow_receiver",
    "slow_link",
    "bad_path",
    "congested_uplink",
    "incast",
    "packet_loss",
    "missing_rank",
]
QUIET = Noise(rate=0.02, unfairness=0.02, compute=0.01, round_trip=0.05, outliers=0, drift=0, unequal=0)


def _wrong(plan: SimulationPlan) -> list[SimulatedCase]:
    """Those that failed; all of them are held against the bound on rounds."""
    result = simulate(plan, diagnose)
    if plan.hosts >= 1024:
        assert result.max_rounds <= MOST_ROUNDS, plan
    return [case for case in result.cases if not case.right]


@pytest.mark.parametrize("fault", SINGLE_FAULTS)
def test_one_fault_among_a_thousand_hosts_is_named(fault: str) -> None:
    assert len(_wrong(SimulationPlan(hosts=1024, fault=fault, cases=6, seed=1, routing="static"))) <= 1


@pytest.mark.parametrize("fault", [fault for fault in SINGLE_FAULTS if fault != "bad_path"])
def test_flows_that_share_cables_by_chance_hide_no_fault(fault: str) -> None:
    assert len(_wrong(SimulationPlan(hosts=1024, fault=fault, cases=6, seed=2, routing="ecmp"))) <= 1


@pytest.mark.parametrize("routing", ["ecmp", "static"])
@pytest.mark.parametrize("hosts", [128, 1024])
def test_healthy_fabrics_raise_no_alarm(hosts: int, routing: str) -> None:
    assert not _wrong(SimulationPlan(hosts=hosts, fault="none", cases=25, seed=3, routing=routing))


def test_a_cable_that_a_hash_hides_accuses_nobody_else() -> None:
    wrong = _wrong(SimulationPlan(hosts=1024, fault="bad_path", cases=15, seed=4, routing="ecmp"))
    assert sum(bool(case.found) for case in wrong) <= 1


def test_sixteen_thousand_hosts() -> None:
    assert not _wrong(SimulationPlan(hosts=16384, fault="slow_sender", cases=1, seed=5))


@pytest.mark.parametrize("fault", ["slow_receiver", "bad_path", "congested_uplink"])
def test_rails_are_told_apart(fault: str) -> None:
    plan = SimulationPlan(hosts=128, topology="rail", rails=8, fault=fault, cases=8, seed=6, routing="static")
    assert len(_wrong(plan)) <= 1


def test_an_oversubscribed_fabric_is_healthy() -> None:
    assert not _wrong(SimulationPlan(hosts=1024, fault="none", cases=10, seed=7, oversubscription=2.0))


@pytest.mark.parametrize("routing", ["ecmp", "static"])
@pytest.mark.parametrize("fault", ["slow_host", "slow_sender", "slow_link"])
def test_where_leaves_are_not_known_ends_are_found_in_rounds_that_grow_with_the_logarithm(
    fault: str, routing: str
) -> None:
    result = simulate(
        SimulationPlan(hosts=256, fault=fault, cases=8, seed=8, routing=routing, leaves_known=False), diagnose
    )
    assert result.right >= 7
    assert result.max_rounds <= 2 * 8 + 4 + 6 + 4, "pairs by the logarithm of 256, comparisons, compute"


def test_where_leaves_are_not_known_flows_that_share_cables_raise_no_alarm() -> None:
    assert not _wrong(SimulationPlan(hosts=256, fault="none", cases=25, seed=9, leaves_known=False))


def test_a_finding_says_what_was_measured() -> None:
    topology = fat_tree(1024)
    fault = Fault(
        injection="slow_sender",
        expected="slow_sender",
        keep=0.5,
        endpoint=77,
        links=(LinkFault(link=topology.out_of(77), keep=0.5),),
    )
    verdict = diagnose(SimulatedFabric(topology, [fault], noise=QUIET, seed=0))
    (finding,) = verdict.findings
    assert (finding.kind, finding.hosts, finding.ranks) == ("slow_sender", ("h77",), (77,))
    assert finding.confidence > 0.99
    assert finding.evidence["outwards_bytes_per_s"] == pytest.approx(0.5 * topology.host_rate, rel=0.05)
    assert "h77 sends slowly" in finding.sentence


def test_a_leaf_whose_cables_are_busy_names_all_its_hosts() -> None:
    situation = make_situation(SimulationPlan(hosts=1024, fault="congested_uplink", seed=9, routing="static"), 0)
    verdict = diagnose(situation.fabric)
    assert score(0, situation, verdict, real_s=0.0, processor_s=0.0).right
    assert len(verdict.findings[0].hosts) == 32
    assert "uplink is congested" in verdict.findings[0].sentence


def test_two_slow_hosts_are_both_named() -> None:
    plan = SimulationPlan(hosts=1024, fault="two", cases=6, seed=10, routing="static")
    wrong = _wrong(plan)
    assert len(wrong) <= 1, np.array([[case.expected, case.found] for case in wrong], dtype=object)
