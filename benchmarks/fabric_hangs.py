"""How often, and how soon, the watch names the rank and the collective of a hang: seeded cases on four gloo ranks.

`python benchmarks/fabric_hangs.py --cases 40 --seed 1 --write`. A case counts where the first thing that the watch says
has the right kind, the right rank alone and the right collective (axis and number), within 15 s of the fault. Healthy
runs, one rank of which is busy for long while the others wait for it, must be left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.reporting import add_output_options, report
from cluster.fabric.findings import Finding
from tests.system.fabric.hangs import HANG_FAULTS, HangCase, draw_hang, is_named, run_hang

WITHIN_SECONDS = 15.0
SHARE = 0.95
_BUSY_SECONDS = 14.0


def _cases(options: argparse.Namespace) -> list[HangCase]:
    cases = []
    for index in range(options.cases):
        rng = np.random.default_rng([options.seed, index])
        cases.append(draw_hang(rng, HANG_FAULTS[index % len(HANG_FAULTS)]))
    for index in range(options.healthy):
        rng = np.random.default_rng([options.seed, 10_000 + index])
        step = int(rng.integers(10, 60))
        cases.append(
            HangCase(fault="busy", rank=int(rng.integers(4)), step=step, slot=0, steps=step + 20, seconds=_BUSY_SECONDS)
        )
    return cases


def _run(case: HangCase) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="fabric-hangs-") as folder:
        outcome = run_hang(case, Path(folder), patience_s=180.0 if case.fault == "busy" else 40.0)
    found = outcome.findings[0].finding if outcome.findings else None
    seconds = outcome.seconds
    if case.fault == "busy":
        right = not outcome.findings and len(outcome.ended) == 4
    else:
        right = is_named(case, outcome) and seconds is not None and seconds <= WITHIN_SECONDS
    print(f"{case.fault:<10} rank {case.rank} {'right' if right else 'WRONG'} {seconds}", file=sys.stderr, flush=True)
    return {
        "fault": case.fault,
        "rank": case.rank,
        "step": case.step,
        "axis": outcome.axis,
        "number": outcome.number,
        "right": right,
        "seconds": None if seconds is None else round(seconds, 2),
        "orphans": len(outcome.orphans),
        "stacks": sorted(number for number, text in outcome.stacks.items() if text),
        "found": _told(found) if found else None,
    }


def _told(found: Finding) -> dict[str, Any]:
    """The finding, without where this machine keeps its files."""
    text = json.dumps(found.as_data()).replace(f"{Path(__file__).parent.parent.resolve()}/", "")
    data = json.loads(text)
    data["evidence"]["place"] = data["evidence"].get("place", [])[:1]
    return data


def main() -> int:
    """Runs all cases, some at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=40, help="hangs, in turn of each kind")
    parser.add_argument("--healthy", type=int, default=4, help="healthy runs with one long wait")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=1, help="cases that run at the same time")
    add_output_options(parser)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before the ranks' parent starts
    cases = _cases(options)
    with ThreadPoolExecutor(options.at_once) as threads:
        results = list(threads.map(_run, cases))
    hangs = [result for result in results if result["fault"] != "busy"]
    healthy = [result for result in results if result["fault"] == "busy"]
    named = sum(result["right"] for result in hangs)
    alarms = sum(result["found"] is not None for result in healthy)
    orphans = sum(result["orphans"] for result in results)
    seconds = sorted(result["seconds"] for result in hangs if result["seconds"] is not None)
    by_fault = {
        fault: f"{sum(each['right'] for each in hangs if each['fault'] == fault)} of "
        f"{sum(each['fault'] == fault for each in hangs)}"
        for fault in HANG_FAULTS
    }
    summary = {
        f"named rightly within {WITHIN_SECONDS:g} s": f"{named} of {len(hangs)}",
        **{f"  {fault}": counts for fault, counts in by_fault.items()},
        "seconds to the finding, median and most": f"{np.median(seconds):.1f}, {seconds[-1]:.1f}"
        if seconds
        else "none",
        "false alarms in healthy runs with a long wait": f"{alarms} of {len(healthy)}",
        "watchers left behind": str(orphans),
    }
    met = named >= SHARE * len(hangs) and alarms == 0 and orphans == 0
    failures = [result for result in results if not result["right"]]
    return report("fabric_hangs", {"summary": summary, "met": met, "failures": failures, "cases": results}, options)


if __name__ == "__main__":
    sys.exit(main())
