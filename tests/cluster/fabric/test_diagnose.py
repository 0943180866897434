"""Diagnoses of simulated fabrics of eight hosts, of which the analysis sees measurements alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from cluster.fabric.diagnose import diagnose
from cluster.fabric.findings import Verdict
from cluster.fabric.probing import Endpoint, Figures, Flows, StalledError, UnresponsiveError
from cluster.fabric.simulation.campaign import FaultChoice, SimulationPlan, SimulationResult, make_situation, simulate

SINGLE: tuple[FaultChoice, ...] = (
    "slow_host",
    "slow_sender",
    "slow_receiver",
    "slow_link",
    "bad_path",
    "congested_uplink",
    "incast",
    "packet_loss",
    "missing_rank",
)


def run(fault: FaultChoice, cases: int, hosts: int = 8) -> SimulationResult:
    """Seeded cases; what was wrong is in the plan's seed and number."""
    return simulate(SimulationPlan(hosts=hosts, topology="two-leaves", fault=fault, cases=cases, seed=11), diagnose)


def wrong(result: SimulationResult) -> list[str]:
    """For the message of a failed test."""
    return [f"case {case.number}: {case.expected} found {case.found}" for case in result.cases if not case.right]


@pytest.mark.parametrize("fault", SINGLE)
def test_single_faults_are_named(fault: FaultChoice) -> None:
    result = run(fault, 12)
    assert len(wrong(result)) <= 1, wrong(result)


def test_two_faults_at_once_are_both_named() -> None:
    result = run("two", 20)
    assert len(wrong(result)) <= 2, wrong(result)


def test_nothing_is_said_of_healthy_fabrics() -> None:
    result = run("none", 80)
    assert wrong(result) == []


def test_a_healthy_fabric_takes_few_rounds_and_no_diagnosis_too_long() -> None:
    assert np.median([case.rounds for case in run("none", 10).cases]) <= 32
    assert max(case.simulated_s for case in run("random", 12).cases) < 30


@pytest.mark.parametrize("hosts", [4, 6, 16])
def test_other_numbers_of_hosts_are_diagnosed_as_well(hosts: int) -> None:
    for fault in ("slow_sender", "slow_host", "none"):
        result = run(fault, 4, hosts)  # type: ignore[arg-type]
        assert wrong(result) == []


def test_a_verdict_carries_what_was_measured() -> None:
    situation = make_situation(SimulationPlan(hosts=8, topology="two-leaves", fault="none", seed=2), 0)
    verdict = diagnose(situation.fabric)
    rates = verdict.details["pairs_bytes_per_s"]
    assert [row[index] for index, row in enumerate(rates)] == [None] * 8
    assert min(rate for row in rates for rate in row if rate is not None) > 5e6
    assert verdict.beta_s_per_byte == pytest.approx(8 / 50e6, rel=0.1)
    assert verdict.alpha_s is not None
    assert 0 < verdict.alpha_s < 1e-3
    assert len(verdict.details["compute_s"]) == 8
    assert 0.01 <= verdict.details["noise_share"] < 0.1


class BrokenFabric:
    """Three healthy hosts of one machine, until a transfer raises."""

    def __init__(self, error: Exception, *, at_transfer: int = 3) -> None:
        self.endpoints = tuple(Endpoint(rank=number, host=f"n{number}", machine="m") for number in range(3))
        self.seconds = 1.0
        self._error = error
        self._left = at_transfer

    def compute(self, who: Sequence[int], *, work_s: float) -> Figures:
        return np.full(len(who), work_s)

    def transfer(self, flows: Flows, *, num_bytes: int) -> Figures:
        self._left -= 1
        if self._left < 0:
            raise self._error
        return np.full(len(flows), 1e8)

    def round_trip(self, pairs: Flows, *, repeats: int) -> Figures:
        return np.full(len(pairs), 1e-4)

    def counters(self) -> Sequence[Mapping[str, float]]:
        return [{} for _ in self.endpoints]


def said(error: Exception) -> Verdict:
    return diagnose(BrokenFabric(error))


def test_a_rank_that_answers_no_more_is_the_finding() -> None:
    (finding,) = said(UnresponsiveError([1], "a transfer")).findings
    assert (finding.kind, finding.hosts, finding.ranks) == ("missing_rank", ("n1",), (1,))
    assert finding.sentence.startswith("Rank 1 (n1) answers no more, found during a transfer")


def test_ranks_whose_host_nobody_knows_are_named_by_number_alone() -> None:
    (finding,) = said(UnresponsiveError([7, 9], "the start")).findings
    assert finding.hosts == ()
    assert finding.sentence.startswith("Ranks 7 and 9 answer no more")


def test_the_end_that_all_stalled_transfers_share_is_the_finding() -> None:
    (finding,) = said(StalledError([(0, 2), (2, 1)], "a transfer")).findings
    assert (finding.kind, finding.hosts) == ("transport_fault", ("n2",))
    (single,) = said(StalledError([(0, 2)], "a transfer")).findings
    assert single.hosts == ("n0", "n2")


def test_ranks_that_waited_in_vain_are_the_finding_where_no_transfer_is_known() -> None:
    (finding,) = said(StalledError([], "connecting (rank 1: no route)", ranks=[1, 2])).findings
    assert (finding.kind, finding.hosts, finding.ranks) == ("transport_fault", ("n1", "n2"), (1, 2))
    assert finding.sentence == (
        "Nothing comes through during connecting (rank 1: no route): all ranks answer, but ranks 1 and 2 (n1 and n2) waited "
        "in vain."
    )


def test_a_stall_of_which_nothing_is_known_is_a_finding_too() -> None:
    (finding,) = said(StalledError([], "connecting")).findings
    assert (finding.kind, finding.hosts, finding.ranks) == ("transport_fault", (), ())


def test_one_host_alone_has_no_network_to_diagnose() -> None:
    fabric = BrokenFabric(RuntimeError("never asked"), at_transfer=0)
    fabric.endpoints = fabric.endpoints[:1]
    assert diagnose(fabric).healthy
