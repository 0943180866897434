"""Diagnosis of simulated fabrics too wide to measure every pair. Fixed seeds; the full campaigns are a benchmark."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.fabric.diagnose import diagnose
from cluster.fabric.probing import Flows
from cluster.fabric.settings import DiagnosisSettings
from cluster.fabric.simulation.campaign import (
    FaultChoice,
    SimulatedCase,
    SimulationPlan,
    make_situation,
    score,
    simulate,
)
from cluster.fabric.simulation.fabric import Noise, SimulatedFabric
from cluster.fabric.simulation.faults import Fault, LinkFault
from cluster.fabric.simulation.topology import fat_tree
from cluster.fabric.stages.session import Session
from cluster.fabric.wide.computing import LEAST_PASSES
from cluster.fabric.wide.start_up import time_start_up

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


@pytest.mark.parametrize("fault", ["none", "slow_sender", "slow_host", "congested_uplink"])
@pytest.mark.parametrize("leaves_known", [True, False])
def test_what_a_message_and_a_byte_take_is_known_of_many_hosts_too(fault: FaultChoice, leaves_known: bool) -> None:
    plan = SimulationPlan(hosts=1024, fault=fault, cases=2, seed=12, leaves_known=leaves_known)
    for number in range(plan.cases):
        situation = make_situation(plan, number)
        verdict = diagnose(situation.fabric)
        topology = situation.topology
        assert verdict.beta_s_per_byte == pytest.approx(1 / topology.host_rate, rel=0.1)
        if verdict.alpha_s is None:
            assert (fault, leaves_known, verdict.rounds) == ("slow_host", True, MOST_ROUNDS), (
                "its last pass took the round"
            )
            continue
        assert verdict.alpha_s == pytest.approx(0.75 * topology.round_trip_s, rel=0.5), (
            "one and a half round trips there and back"
        )
        assert verdict.rounds <= MOST_ROUNDS or not leaves_known


def test_start_up_is_timed_where_rounds_are_left_and_never_within_a_host() -> None:
    situation = make_situation(SimulationPlan(hosts=16, topology="rail", fault="none", seed=13), 0)
    session = Session(situation.fabric, DiagnosisSettings())
    session.rounds = MOST_ROUNDS - LEAST_PASSES
    time_start_up(session, left=LEAST_PASSES)
    assert session.alpha_s is None
    asked: list[Flows] = []
    session.round_trip = lambda pairs, *, repeats=5: asked.append(pairs) or np.ones(len(pairs))  # type: ignore[method-assign]
    time_start_up(session)
    assert session.alpha_s == 0.5
    hosts = situation.topology.host_of[asked[0]]
    assert (hosts[:, 0] != hosts[:, 1]).all()


@pytest.mark.parametrize("hosts", [32, 64])
def test_a_few_dozen_hosts_whose_flows_are_hashed_onto_cables_are_healthy(hosts: int) -> None:
    plan = SimulationPlan(hosts=hosts, fault="none", cases=6, seed=11)
    result = simulate(plan, diagnose)
    assert result.right == 6, [case.found for case in result.cases]
