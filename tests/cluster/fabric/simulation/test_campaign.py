"""Campaigns: who is counted as right, and that cases repeat. The diagnoses here are made up."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.fabric.findings import Finding, Kind, Verdict
from cluster.fabric.probing import Fabric
from cluster.fabric.simulation.campaign import (
    FAULT_CHOICES,
    SimulationPlan,
    make_situation,
    run_cases,
    score,
    simulate,
)


def _verdict(*findings: tuple[Kind, list[int]]) -> Verdict:
    return Verdict(
        findings=tuple(
            Finding(
                kind=kind,
                hosts=tuple(f"h{host}" for host in hosts),
                ranks=tuple(hosts),
                confidence=0.99,
                evidence={},
                sentence="",
            )
            for kind, hosts in findings
        ),
        alpha_s=None,
        beta_s_per_byte=None,
        seconds=1.0,
        rounds=3,
    )


def _slowest_compute(fabric: Fabric) -> Verdict:
    """A diagnosis that knows one fault only."""
    seconds = np.median([fabric.compute(range(len(fabric.endpoints)), work_s=0.1) for _ in range(9)], axis=0)
    return _verdict(("slow_host", [int(seconds.argmax())])) if seconds.max() > 1.07 * np.median(seconds) else _verdict()


def test_a_diagnosis_is_counted_right_for_what_it_finds() -> None:
    assert (
        simulate(SimulationPlan(hosts=8, topology="two-leaves", fault="slow_host", cases=30), _slowest_compute).right
        >= 29
    )
    result = simulate(SimulationPlan(hosts=8, topology="two-leaves", fault="slow_sender", cases=30), _slowest_compute)
    assert result.right == 0
    assert result.by_injection()["slow_sender"].cases == 30
    healthy = simulate(SimulationPlan(hosts=1024, fault="none", cases=3), _slowest_compute)
    assert (healthy.share_right, healthy.max_rounds) == (1.0, 9)


def test_a_false_alarm_on_a_healthy_fabric_is_wrong() -> None:
    result = simulate(SimulationPlan(hosts=8, fault="none"), lambda fabric: _verdict(("slow_link", [1])))
    assert (result.right, result.cases[0].extra) == (0, 1)


def test_the_first_finding_counts_and_later_ones_are_extra() -> None:
    situation = make_situation(SimulationPlan(hosts=8, topology="two-leaves", fault="slow_receiver"), 0)
    culprit = situation.faults[0].endpoint
    assert culprit is not None
    right, wrong = ("slow_receiver", [culprit]), ("slow_sender", [(culprit + 1) % 8])
    first = score(0, situation, _verdict(right, wrong), real_s=0.0, processor_s=0.0)
    second = score(0, situation, _verdict(wrong, right), real_s=0.0, processor_s=0.0)
    assert (first.right, first.extra, second.right, second.extra) == (True, 1, False, 1)


def test_of_two_faults_both_must_be_named_first() -> None:
    plan = SimulationPlan(hosts=8, topology="two-leaves", fault="two", cases=100, seed=4)
    situation = next(
        situation
        for situation in (make_situation(plan, number) for number in range(100))
        if {fault.injection for fault in situation.faults} == {"slow_sender", "slow_receiver"}
    )
    named = [(fault.expected, [fault.endpoint]) for fault in situation.faults]
    assert score(0, situation, _verdict(*named[::-1]), real_s=0.0, processor_s=0.0).right
    assert not score(0, situation, _verdict(named[0], named[0]), real_s=0.0, processor_s=0.0).right
    assert not score(0, situation, _verdict(named[0], ("slow_host", [0]), named[1]), real_s=0.0, processor_s=0.0).right


def test_cases_repeat_and_differ() -> None:
    plan = SimulationPlan(hosts=64, cases=20, seed=3)
    faults = [make_situation(plan, number).faults for number in range(20)]
    assert faults == [make_situation(plan, number).faults for number in range(20)]
    assert len({fault for (fault,) in faults}) > 15
    assert make_situation(plan, 0).topology.salt != make_situation(plan, 1).topology.salt


def test_names_of_leaves_can_be_hidden() -> None:
    hidden = make_situation(SimulationPlan(hosts=64, leaves_known=False), 0).fabric
    told = make_situation(SimulationPlan(hosts=64), 0).fabric
    assert {endpoint.leaf for endpoint in hidden.endpoints} == {None}
    assert len({endpoint.leaf for endpoint in told.endpoints}) == 8


def test_a_result_is_plain_data_with_every_case() -> None:
    result = simulate(SimulationPlan(hosts=8, topology="two-leaves", fault="random", cases=12), lambda _: _verdict())
    data = result.as_data()
    assert data["plan"]["hosts"] == data["endpoints"] == 8
    assert len(data["cases"]) == 12
    assert data["rounds"] == {"median": 0.0, "max": 0.0}, "whatever a verdict claims"
    assert sum(accuracy["cases"] for accuracy in data["by_fault"].values()) == 12
    assert "none" not in data["by_fault"]


def test_an_error_says_which_case_it_belongs_to() -> None:
    def broken(fabric: Fabric) -> Verdict:
        raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError) as raised:
        list(run_cases(SimulationPlan(hosts=8, seed=7), broken))
    assert "simulated case 0" in raised.value.__notes__[0]
    assert "seed=7" in raised.value.__notes__[0]


@pytest.mark.parametrize("wrong", [{"hosts": 3}, {"cases": 0}, {"oversubscription": 0.5}, {"rails": 0}])
def test_impossible_plans_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        SimulationPlan(**{"hosts": 8, **wrong})


@pytest.mark.parametrize("fault", FAULT_CHOICES)
@pytest.mark.parametrize(("topology", "hosts"), [("two-leaves", 8), ("fat-tree", 1024), ("rail", 64)])
def test_every_choice_makes_a_fabric(fault: str, topology: str, hosts: int) -> None:
    situation = make_situation(SimulationPlan(hosts=hosts, topology=topology, fault=fault), 0)
    assert len(situation.faults) == (2 if fault == "two" else 1)
    assert len(situation.fabric.endpoints) == hosts * (8 if topology == "rail" else 1)
