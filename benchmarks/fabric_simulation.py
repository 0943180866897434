"""How many rounds a diagnosis takes, and how often it is right, on simulated fabrics that no test machine has.

    python benchmarks/fabric_simulation.py --write

300 seeded single faults on fabrics of each size: those of the tests' own hosts (8 behind two leaves), fat-trees whose flows
are routed by tables (InfiniBand) or by a hash (RoCE), and rails; and healthy fabrics of each. The bounds: 99 % right, no false
alarm, and at 1,024 and 16,384 hosts at most 12 rounds, and 20 s of one core for simulation and analysis together. Single slow
cables of a hashed fat-tree are reported and not bounded: a hash lets at most six flows of a leaf's 32 run alone on their
cables in a round, so that 12 rounds cannot try all cables.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from reporting import add_output_options, report

from cluster.fabric.diagnose import diagnose
from cluster.fabric.simulation.campaign import SimulationPlan, SimulationResult, simulate

MAX_ROUNDS = 12
MIN_SHARE_RIGHT = 0.99
MAX_PROCESSOR_S = 20.0
LARGE = 1024


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """A plan and what is asked of it."""

    name: str
    plan: SimulationPlan
    bounded: bool = True


def campaigns(options: argparse.Namespace) -> Iterator[Campaign]:
    """Of single faults and of none, on each fabric."""
    seed, cases = options.seed, options.cases
    fabrics = {"8 hosts, two leaves": SimulationPlan(hosts=8, topology="two-leaves", seed=seed)}
    for hosts in (1024, 16384):
        fabrics[f"{hosts:,} hosts, tables"] = SimulationPlan(hosts=hosts, routing="static", seed=seed)
        fabrics[f"{hosts:,} hosts, hashed"] = SimulationPlan(hosts=hosts, routing="ecmp", seed=seed)
    fabrics["2,048 hosts of 8 rails, tables"] = SimulationPlan(
        hosts=2048, topology="rail", rails=8, routing="static", seed=seed
    )
    for name, fabric in fabrics.items():
        if options.only in name:
            yield Campaign(name=f"{name}: one fault", plan=replace(fabric, cases=cases))
            yield Campaign(name=f"{name}: none", plan=replace(fabric, fault="none", cases=max(cases // 3, 1)))
            if fabric.hosts == 8:
                two = replace(fabric, fault="two", cases=cases)
                yield Campaign(name=f"{name}: two faults", plan=two, bounded=False)


def bounded_cases(result: SimulationResult) -> list[bool]:
    """Whether each case was right, without slow cables among hashed flows."""
    hashed = result.plan.routing == "ecmp" and result.plan.topology != "two-leaves"
    return [case.right for case in result.cases if not (hashed and "bad_path" in case.injections)]


def is_met(campaign: Campaign, result: SimulationResult) -> bool:
    """Every bound of a campaign."""
    right = bounded_cases(result)
    enough = sum(right) >= (1.0 if result.plan.fault == "none" else MIN_SHARE_RIGHT) * len(right)
    quick = result.max_rounds <= MAX_ROUNDS or result.endpoints < LARGE
    return not campaign.bounded or (
        enough and quick and max(case.processor_s for case in result.cases) <= MAX_PROCESSOR_S
    )


def main() -> int:
    """Exit code 3 where a bound is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300, help="single faults a fabric; a third as many healthy ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="fabrics whose name holds this text")
    add_output_options(parser)
    options = parser.parse_args()
    results = {campaign: simulate(campaign.plan, diagnose) for campaign in campaigns(options)}
    summary: dict[str, Any] = {campaign.name: _line(result) for campaign, result in results.items()}
    data = {campaign.name: _without_right_cases(result) for campaign, result in results.items()}
    met = all(is_met(campaign, result) for campaign, result in results.items())
    return report("fabric_simulation", {"summary": summary, "campaigns": data, "met": met}, options)


def _line(result: SimulationResult) -> str:
    bounded = bounded_cases(result)
    rounds = sorted(case.rounds for case in result.cases)
    text = f"{sum(bounded)} of {len(bounded)} right, {rounds[len(rounds) // 2]} rounds (most {rounds[-1]})"
    text += f", {max(case.processor_s for case in result.cases):.1f} s of one core at most"
    cables = len(result.cases) - len(bounded)
    return f"{text}; slow cables {result.right - sum(bounded)} of {cables}" if cables else text


def _without_right_cases(result: SimulationResult) -> dict[str, Any]:
    """Of the cases, those that failed alone: the others would fill the file."""
    data = result.as_data()
    data["failures"] = [case for case in data.pop("cases") if not case["right"]]
    return data


if __name__ == "__main__":
    raise SystemExit(main())
