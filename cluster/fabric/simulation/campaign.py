"""Seeded faults on simulated fabrics, a diagnosis of each, and how often it was right. Pure numpy."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from cluster.fabric.findings import Verdict
from cluster.fabric.probing import Fabric
from cluster.fabric.simulation.fabric import SimulatedFabric, draw_noise
from cluster.fabric.simulation.faults import INJECTIONS, Fault, Injection, draw_fault, draw_two_faults
from cluster.fabric.simulation.topology import Routing, Topology, fat_tree, two_leaves

Diagnosis = Callable[[Fabric], Verdict]
TopologyName = Literal["fat-tree", "rail", "two-leaves"]
FaultChoice = Injection | Literal["random", "two"]
"""random: one of all that are faults. two: two different ones at once, at different places."""
TOPOLOGIES: tuple[TopologyName, ...] = get_args(TopologyName)
FAULT_CHOICES: tuple[FaultChoice, ...] = (*INJECTIONS, "random", "two")

FAULTS: tuple[Injection, ...] = tuple(injection for injection in INJECTIONS if injection != "none")
_PAIRED: tuple[Injection, ...] = tuple(injection for injection in FAULTS if injection != "missing_rank")
"""Nothing more is measured once a rank is missing."""


@dataclass(frozen=True, kw_only=True)
class SimulationPlan:
    """What is simulated. Case n of a plan depends on the plan's seed and on n alone."""

    hosts: int
    topology: TopologyName = "fat-tree"
    fault: FaultChoice = "random"
    cases: int = 1
    seed: int = 0
    rails: int = 8
    """Network cards of a host, each with its leaf; where the topology is `rail`."""
    oversubscription: float = 1.0
    """What hosts can send over what cables carry, at each level; not for `two-leaves`."""
    routing: Routing = "ecmp"
    leaves_known: bool = True
    """Whether endpoints tell the names of their leaves; those of `two-leaves` never do."""

    def __post_init__(self) -> None:
        """Raises ValueError where no such fabric can be."""
        if self.hosts < 4:
            raise ValueError(f"hosts = {self.hosts}: at least 4 are needed, to tell a sender from a receiver")
        if self.cases < 1 or self.rails < 1 or self.oversubscription < 1:
            raise ValueError("cases, rails and oversubscription must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SimulatedCase:
    """One fabric, its faults, and what was said of them."""

    number: int
    injections: tuple[Injection, ...]
    keeps: tuple[float, ...]
    """Share of bandwidth or of the speed of compute that each fault left."""
    expected: tuple[str, ...]
    """Kind and host of each fault, for people."""
    found: tuple[str, ...]
    """Kind, hosts and confidence of each finding, in the order of the verdict."""
    right: bool
    """The first finding names the fault; with two faults the first two name both; without a fault there is no finding."""
    extra: int
    """Findings that name none of the faults."""
    rounds: int
    """As the fabric counted them: every measurement of compute, transfers or round trips is one."""
    simulated_s: float
    """On the fabric's clock."""
    real_s: float
    """Of the simulation and the analysis together, on this machine, whatever else it does."""
    processor_s: float
    """Processor time of the same, on one core."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How many cases of one kind were right."""

    cases: int
    right: int


@dataclass(frozen=True, kw_only=True)
class SimulationResult:
    """All cases of a plan."""

    plan: SimulationPlan
    endpoints: int
    cases: tuple[SimulatedCase, ...]

    @property
    def right(self) -> int:
        """Number of right verdicts."""
        return sum(case.right for case in self.cases)

    @property
    def share_right(self) -> float:
        """0 to 1."""
        return self.right / len(self.cases)

    @property
    def max_rounds(self) -> int:
        """The most that a case took."""
        return max(case.rounds for case in self.cases)

    def by_injection(self) -> dict[str, Accuracy]:
        """Accuracy for each fault, or pair of faults, that was drawn."""
        drawn = Counter("+".join(case.injections) for case in self.cases)
        right = Counter("+".join(case.injections) for case in self.cases if case.right)
        return {name: Accuracy(cases=drawn[name], right=right[name]) for name in sorted(drawn)}

    def as_data(self) -> dict[str, Any]:
        """For JSON: the counts, and every case."""
        return {
            "plan": asdict(self.plan),
            "endpoints": self.endpoints,
            "right": self.right,
            "share_right": self.share_right,
            "by_fault": {name: asdict(accuracy) for name, accuracy in self.by_injection().items()},
            "rounds": _spread([case.rounds for case in self.cases]),
            "simulated_s": _spread([case.simulated_s for case in self.cases]),
            "real_s": _spread([case.real_s for case in self.cases]),
            "processor_s": _spread([case.processor_s for case in self.cases]),
            "extra_findings": sum(case.extra for case in self.cases),
            "cases": [asdict(case) for case in self.cases],
        }


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A simulated fabric and what is wrong with it."""

    topology: Topology
    faults: tuple[Fault, ...]
    fabric: SimulatedFabric


def simulate(
    plan: SimulationPlan, diagnosis: Diagnosis, *, tell: Callable[[SimulatedCase], None] | None = None
) -> SimulationResult:
    """Runs every case of `plan` through `diagnosis`, which sees the fabric's answers and nothing else. `tell` hears of
    each case as soon as it is done."""
    cases = []
    for case in run_cases(plan, diagnosis):
        cases.append(case)
        if tell is not None:
            tell(case)
    return SimulationResult(plan=plan, endpoints=_topology(plan, salt=0).num_endpoints, cases=tuple(cases))


def run_cases(plan: SimulationPlan, diagnosis: Diagnosis) -> Iterator[SimulatedCase]:
    """The cases of `simulate`, each as soon as it is done. Errors of `diagnosis` say which case they belong to."""
    for number in range(plan.cases):
        situation = make_situation(plan, number)
        started, processor_started = time.perf_counter(), time.process_time()
        try:
            verdict = diagnosis(situation.fabric)
        except Exception as error:
            error.add_note(f"in simulated case {number} of {plan}")
            raise
        yield score(
            number,
            situation,
            verdict,
            real_s=time.perf_counter() - started,
            processor_s=time.process_time() - processor_started,
        )


def make_situation(plan: SimulationPlan, number: int) -> Situation:
    """The fabric of case `number`: its faults, its noise and its hash are drawn anew for each."""
    rng = np.random.default_rng([plan.seed, number])
    topology = _topology(plan, salt=int(rng.integers(2**31)))
    if plan.fault == "two":
        faults: tuple[Fault, ...] = draw_two_faults(rng, _PAIRED, topology)
    else:
        injection = FAULTS[rng.integers(len(FAULTS))] if plan.fault == "random" else plan.fault
        faults = (draw_fault(rng, injection, topology),)
    fabric = SimulatedFabric(
        topology,
        faults,
        noise=draw_noise(rng, topology),
        seed=int(rng.integers(2**31)),
        leaves_known=plan.leaves_known and plan.topology != "two-leaves",
    )
    return Situation(topology=topology, faults=faults, fabric=fabric)


def score(number: int, situation: Situation, verdict: Verdict, *, real_s: float, processor_s: float) -> SimulatedCase:
    """Compares a verdict with what was injected."""
    topology = situation.topology
    faults = tuple(fault for fault in situation.faults if fault.expected is not None)
    first = verdict.findings[: len(faults)]
    named = [any(fault.recognised(finding, topology) for finding in first) for fault in faults]
    known = [any(fault.recognised(finding, topology) for fault in faults) for finding in verdict.findings]
    return SimulatedCase(
        number=number,
        injections=tuple(fault.injection for fault in situation.faults),
        keeps=tuple(fault.keep for fault in situation.faults),
        expected=tuple(fault.described(topology) for fault in faults),
        found=tuple(
            f"{finding.kind} {','.join(finding.hosts[:4])}{'...' * (len(finding.hosts) > 4)} {finding.confidence:.3f}"
            for finding in verdict.findings
        ),
        right=all(named) if faults else verdict.healthy,
        extra=known.count(False),
        rounds=situation.fabric.calls,
        simulated_s=situation.fabric.seconds,
        real_s=real_s,
        processor_s=processor_s,
    )


def _topology(plan: SimulationPlan, *, salt: int) -> Topology:
    if plan.topology == "two-leaves":
        return two_leaves(plan.hosts)
    rails = plan.rails if plan.topology == "rail" else 1
    return fat_tree(plan.hosts, rails=rails, oversubscription=plan.oversubscription, routing=plan.routing, salt=salt)


def _spread(values: list[int] | list[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "max": float(np.max(values))}
