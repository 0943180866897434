"""Where leaves are not known: hosts that share something slow are told from hosts that are slow themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from cluster.fabric.diagnose import diagnose
from cluster.fabric.findings import Finding
from cluster.fabric.probing import Figures, Flows
from cluster.fabric.simulation.campaign import SimulationPlan, make_situation
from cluster.fabric.simulation.fabric import Noise, SimulatedFabric
from cluster.fabric.simulation.faults import Fault, LinkFault
from cluster.fabric.simulation.topology import Routing, fat_tree

QUIET = Noise(rate=0.02, unfairness=0.02, compute=0.01, round_trip=0.05, outliers=0, drift=0, unequal=0)


@pytest.mark.parametrize(("hosts", "routing"), [(128, "static"), (256, "ecmp"), (1024, "ecmp")])
def test_hosts_behind_one_congested_uplink_are_one_finding(hosts: int, routing: Routing) -> None:
    plan = SimulationPlan(hosts=hosts, fault="congested_uplink", cases=3, seed=31, routing=routing, leaves_known=False)
    for number in range(plan.cases):
        situation = make_situation(plan, number)
        leaf_of = situation.topology.leaf_of
        (finding,) = diagnose(situation.fabric).findings
        assert finding.kind == "congested_uplink", number
        assert {int(leaf_of[rank]) for rank in finding.ranks} == {int(leaf_of[situation.faults[0].endpoint])}, number
        assert finding.evidence["leaves_known"] is False
        assert "rather something that they share" in finding.sentence


def slow(*ends: int, hosts: int = 256) -> Sequence[Finding]:
    """Findings where these hosts send at half their rate, each by itself."""
    topology = fat_tree(hosts)
    faults = [
        Fault(
            injection="slow_sender",
            expected="slow_sender",
            keep=0.5,
            endpoint=end,
            links=(LinkFault(link=topology.out_of(end), keep=0.5),),
        )
        for end in ends
    ]
    return diagnose(SimulatedFabric(topology, faults, noise=QUIET, seed=3, leaves_known=False)).findings


def test_a_few_slow_hosts_are_named_each_even_under_one_leaf() -> None:
    assert {(finding.kind, finding.hosts) for finding in slow(8, 9, 100)} == {
        ("slow_sender", ("h8",)),
        ("slow_sender", ("h9",)),
        ("slow_sender", ("h100",)),
    }


def test_more_hosts_than_a_few_are_never_accused_each() -> None:
    (finding,) = slow(3, 50, 90, 130, 170, 210)
    assert finding.kind == "congested_uplink"
    assert finding.hosts == ("h3", "h50", "h90", "h130", "h170", "h210")
    assert "send slowly, all of them" in finding.sentence


def test_two_hosts_that_are_fast_to_each_other_share_what_is_slow() -> None:
    """Of a leaf of eight only two take part: too few to count, yet neither's own link is slow."""
    topology = fat_tree(256)
    up = [topology.cable(2, spine)[0] for spine in range(topology.spines)]
    fault = Fault(
        injection="congested_uplink",
        expected="congested_uplink",
        keep=0.5,
        endpoint=16,
        links=tuple(LinkFault(link=link, keep=0.5) for link in up),
    )
    fabric = SimulatedFabric(topology, [fault], noise=QUIET, seed=3, leaves_known=False)
    found = diagnose(Without(fabric, range(18, 24))).findings
    assert [(finding.kind, finding.hosts) for finding in found] == [("congested_uplink", ("h16", "h17"))]


class Without:
    """A fabric without some of its endpoints."""

    def __init__(self, fabric: SimulatedFabric, hidden: Sequence[int]) -> None:
        self._fabric = fabric
        self._kept = np.array([index for index in range(len(fabric.endpoints)) if index not in hidden])
        self.endpoints = tuple(fabric.endpoints[index] for index in self._kept)

    @property
    def seconds(self) -> float:
        return self._fabric.seconds

    def compute(self, who: Sequence[int], *, work_s: float) -> Figures:
        return self._fabric.compute(self._kept[list(who)].tolist(), work_s=work_s)

    def transfer(self, flows: Flows, *, num_bytes: int) -> Figures:
        return self._fabric.transfer(self._kept[flows], num_bytes=num_bytes)

    def round_trip(self, pairs: Flows, *, repeats: int) -> Figures:
        return self._fabric.round_trip(self._kept[pairs], repeats=repeats)

    def counters(self) -> Sequence[Mapping[str, float]]:
        return [{} for _ in self.endpoints]
