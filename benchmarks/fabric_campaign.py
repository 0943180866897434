"""How often a diagnosis names the fault that was injected into a fabric of real ranks and real links.

Eight hosts on two leaves, made of network namespaces, one rank each. A case injects one seeded fault (or two, or none, or
stops a rank meanwhile), diagnoses, scores, and takes the fault back. Needs root: `make fabric-campaign`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.reporting import add_output_options, report
from cluster.fabric.findings import Finding
from tests.system.fabric.diagnosing import DiagnosingRanks, is_told
from tests.system.fabric.faults import FAULTS, Fault, draw_fault, draw_two_faults, gone_rank, no_fault
from tests.system.fabric.hosts import FabricOfHosts
from tests.system.fabric.ranks import RankFailureError

BOUNDS = {"singles": 0.95, "doubles": 0.85, "healthy": 1.0, "hangs": 0.95}
DIAGNOSIS_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is injected together."""

    group: str
    number: int
    faults: tuple[Fault, ...]

    @property
    def name(self) -> str:
        """Group and number."""
        return f"{self.group}-{self.number}"


class World:
    """A context: ranks that diagnose `fabric`, started when needed, and anew after they have been harmed."""

    def __init__(self, fabric: FabricOfHosts) -> None:
        self.fabric = fabric
        self._running: DiagnosingRanks | None = None

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    @property
    def running(self) -> DiagnosingRanks:
        """The ranks."""
        if self._running is None:
            self._running = DiagnosingRanks(self.fabric).__enter__()
        return self._running

    def abandon(self) -> None:
        """Ends the ranks."""
        if self._running is not None:
            self._running.__exit__(None, None, None)
            self._running = None


def main() -> int:
    """Runs the campaign; 3 where a bound is not met."""
    parser = argparse.ArgumentParser(description=__doc__)
    for group, count in (("singles", 108), ("doubles", 40), ("healthy", 100), ("hangs", 20)):
        parser.add_argument(f"--{group}", type=int, default=count, help=f"cases (default {count})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(FAULTS), help="faults to draw from, separated by commas")
    parser.add_argument("--measurements", type=Path, help="write what each case measured into this folder")
    add_output_options(parser)
    options = parser.parse_args()
    begin = time.monotonic()
    with FabricOfHosts() as fabric, World(fabric) as world:
        records = []
        for case in draw_cases(fabric, options):
            records.append(run_case(world, case, options.measurements))
            print(line_of(records[-1]), file=sys.stderr, flush=True)
    return report("fabric_campaign", summarise(records, options.seed, time.monotonic() - begin), options)


def draw_cases(fabric: FabricOfHosts, options: argparse.Namespace) -> Iterator[Case]:
    """All cases in an order drawn from the seed: a machine that changes over time harms no group alone."""
    names = options.only.split(",")
    draws: dict[str, Callable[[np.random.Generator, int], tuple[Fault, ...]]] = {
        "singles": lambda rng, number: (draw_fault(rng, names[number % len(names)], fabric),),
        "doubles": lambda rng, number: draw_two_faults(rng, fabric),
        "healthy": lambda rng, number: (no_fault(),),
        "hangs": lambda rng, number: (gone_rank(rng, fabric),),
    }
    cases = [(group, number) for group in draws for number in range(getattr(options, group))]
    np.random.default_rng(options.seed).shuffle(cases)
    for group, number in cases:
        rng = np.random.default_rng([options.seed, list(draws).index(group), int(number)])
        yield Case(group=group, number=int(number), faults=draws[group](rng, int(number)))


def run_case(world: World, case: Case, measurements: Path | None) -> dict[str, Any]:
    """Injects, diagnoses, scores. A diagnosis that does not end is a wrong one."""
    record: dict[str, Any] = {
        "case": case.name,
        "injected": [{"fault": fault.name, **fault.settings} for fault in case.faults],
        "expected": [[{"kind": way.kind, "hosts": list(way.hosts)} for way in fault.expected] for fault in case.faults],
    }
    running = world.running
    try:
        with contextlib.ExitStack() as stack:
            for fault in case.faults:
                stack.enter_context(fault.inject(world.fabric, running.ranks))
            begin = time.monotonic()
            done = running.diagnose()
            seconds = time.monotonic() - begin
    except RankFailureError as error:
        world.abandon()
        return {**record, "right": False, "found": [], "failure": str(error)}
    if case.group == "hangs":
        world.abandon()
    findings = [Finding.from_data(data) for data in done["verdict"]["findings"]]
    if measurements is not None:
        measurements.mkdir(parents=True, exist_ok=True)
        (measurements / f"{case.name}.json").write_text(json.dumps({**record, **done}) + "\n")
    return {
        **record,
        "right": is_told(case.faults, findings),
        "besides": sum(not any(fault.is_met_by(finding) for fault in case.faults) for finding in findings),
        "found": [finding.as_data() for finding in findings],
        "seconds": round(seconds, 2),
        "rounds": done["verdict"]["rounds"],
    }


def line_of(record: dict[str, Any]) -> str:
    """A case in one line."""
    found = "; ".join(f"{f['kind']} {'+'.join(f['hosts'])} ({f['confidence']:.2f})" for f in record["found"])
    injected = " and ".join(json.dumps(fault) for fault in record["injected"])
    verdict = "right" if record["right"] else "WRONG"
    return f"{record['case']:12} {verdict} {record.get('seconds', 0.0):5.1f} s  {injected} -> {found or 'healthy'}"


def summarise(records: list[dict[str, Any]], seed: int, seconds: float) -> dict[str, Any]:
    """Counts by group and by fault, the failures, and every case."""
    groups = {group: [r for r in records if r["case"].startswith(group)] for group in BOUNDS}
    right = {group: sum(r["right"] for r in found) for group, found in groups.items() if found}
    spent = [r["seconds"] for r in records if "seconds" in r]
    shares = {group: right[group] / len(groups[group]) for group in right}
    by_fault: dict[str, list[bool]] = {}
    for record in groups["singles"] + groups["hangs"]:
        by_fault.setdefault(record["injected"][0]["fault"], []).append(record["right"])
    longest = max(spent, default=0.0)
    return {
        "summary": {
            **{f"{group} told right": f"{right[group]} of {len(groups[group])}" for group in right},
            **{f"  {fault}": f"{sum(told)} of {len(told)}" for fault, told in sorted(by_fault.items())},
            "told right, with a wrong finding after": sum(r["right"] and r["besides"] > 0 for r in records),
            "seconds a diagnosis": f"{np.median(spent):.1f} (median), {longest:.1f} (longest)"
            if spent
            else "none ended",
        },
        "met": all(share >= BOUNDS[group] for group, share in shares.items()) and longest <= DIAGNOSIS_SECONDS,
        "bounds": BOUNDS,
        "right": shares,
        "seed": seed,
        "seconds": round(seconds, 1),
        "failures": [line_of(record) for record in records if not record["right"]],
        "cases": records,
    }


if __name__ == "__main__":
    sys.exit(main())
