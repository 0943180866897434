"""How soon a launched run that was harmed trains again, and what it loses: faults on a SLURM of five hosts on this machine.

`python benchmarks/launcher_faults.py --rounds 2 --write`. The scenarios are those of tests/system/slurm. A case counts as right
where the run ends with the losses of an undisturbed one, every step once, and leaves no process. Time to detect is from the
harm to the event that tells of it, time to train again to the end of the first new step. Needs root, network namespaces, SLURM.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.reporting import add_output_options, report
from tests.system.slurm.cluster import SlurmOfHosts
from tests.system.slurm.launched import (
    EVERY_STEPS,
    LaunchedFigures,
    LaunchedRun,
    assert_equal_figures,
    undisturbed,
    write_run_files,
)
from tests.system.slurm.scenarios import SCENARIOS, mend, small_disk

MEDIAN_SECONDS, MOST_SECONDS = 30.0, 60.0
CRASHES = (
    "rank killed in a step",
    "rank killed in a collective",
    "rank killed in a save",
    "agent killed",
    "host lost",
    "host lost without a spare",
    "rendezvous host lost",
    "rank stopped",
)
"""What the bounds are of: not waiting for a cable, for another job's end, for a person who frees a disk."""


def _case(
    cluster: SlurmOfHosts, root: Path, disk: Path, name: str, number: int, whole: LaunchedFigures
) -> dict[str, Any]:
    scenario = SCENARIOS[name]
    run = LaunchedRun(
        cluster=cluster,
        root=root,
        name=f"{name.replace(' ', '-')}-{number}",
        settings=scenario.settings,
        run_root=disk / f"runs-{number}" if scenario.small_disk else None,
    )
    figures: dict[str, Any] = {"scenario": name, "right": False}
    try:
        run.launch()
        harm = scenario.inject(run)
        run.finish()
        run.wait_until_nothing_is_left()
        figures |= _times(run, harm.at)
        assert_equal_figures(run.figures(), whole, same_layout=scenario.same_layout)
        figures["right"] = True
    except AssertionError as error:
        figures["problem"] = str(error)[:400]
        print(error, file=sys.stderr)
    mend(cluster)
    print(figures, file=sys.stderr, flush=True)
    return figures


def _times(run: LaunchedRun, harmed: float) -> dict[str, Any]:
    told = [
        event["time"] for event in run.events("failure", "stop_asked", "requeue", "attempt") if event["time"] > harmed
    ]
    lost = run.events("rollback")
    # The ranks that were harmed may have made steps on their way to the end.
    restarted = [event["time"] for event in run.events("ranks_started") if event["time"] > harmed]
    steps = [line["time"] for line in run.directory.read_metrics() if "loss" in line]
    again = [moment for moment in steps if restarted and moment > restarted[0]]
    return {
        "seconds_to_detect": round(told[0] - harmed, 2) if told else None,
        "seconds_to_train_again": round(again[0] - harmed, 2) if again else None,
        "lost_steps": sum(event["lost_steps"] for event in lost),
    }


def main() -> int:
    """Runs all scenarios, some times each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="SCENARIO")
    add_output_options(parser)
    options = parser.parse_args()
    cases: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="launcher-faults-")))
        disk = stack.enter_context(small_disk(root / "disk"))
        cluster = stack.enter_context(SlurmOfHosts(spare=1))
        write_run_files(root)
        whole = undisturbed(root)
        for number in range(options.rounds):
            cases += [_case(cluster, root, disk, name, number, whole) for name in options.only]
    crashes = [case for case in cases if case["scenario"] in CRASHES]
    seconds = [case["seconds_to_train_again"] for case in crashes if case.get("seconds_to_train_again")]
    median, most = (float(np.percentile(seconds, share)) if seconds else float("inf") for share in (50, 95))
    lost = max((case.get("lost_steps", 0) for case in crashes), default=0)
    right = sum(case["right"] for case in cases)
    rows = {
        name: ", ".join(
            f"{case.get('seconds_to_detect')} / {case.get('seconds_to_train_again')} / {case.get('lost_steps')}"
            for case in cases
            if case["scenario"] == name
        )
        for name in options.only
    }
    result = {
        "summary": {
            "runs equal to an undisturbed one": f"{right} of {len(cases)}",
            "crash to training again, median": f"{median:.1f} s (bound {MEDIAN_SECONDS:g})",
            "crash to training again, 95th percentile": f"{most:.1f} s (bound {MOST_SECONDS:g})",
            "most steps lost": f"{lost} (bound {EVERY_STEPS}, one save interval)",
            "seconds to detect / to train again / lost steps": "",
            **{f"  {name}": text for name, text in rows.items()},
        },
        "met": right == len(cases) and median <= MEDIAN_SECONDS and most <= MOST_SECONDS and lost <= EVERY_STEPS,
        "cases": cases,
    }
    return report("launcher_faults", result, options)


if __name__ == "__main__":
    sys.exit(main())
