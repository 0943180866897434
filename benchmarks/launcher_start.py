"""From submission to the first step on a SLURM of four hosts on this machine, and what of it is the launcher's.

`python benchmarks/launcher_start.py --rounds 5 --write`. In each round the same run is started twice: by `mega launch --on
slurm`, and by a bare `srun mega train`, which imports torch, builds the model and compiles as much. What the first takes
longer is the launcher's: submission, supervisor, agents, preflight. Needs root, network namespaces and SLURM.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.reporting import add_output_options, report
from tests.system.slurm.cluster import SlurmOfHosts
from tests.system.slurm.launched import RANKS, LaunchedRun, write_run_files

WHOLE_SECONDS = 25.0
OWN_SECONDS = 5.0


def _first_step(run: LaunchedRun) -> float:
    """When it was done, in seconds since 1970."""
    run.wait_for_step(1)
    return float(next(line["time"] for line in run.directory.read_metrics() if "loss" in line))


def _launched(cluster: SlurmOfHosts, root: Path, name: str) -> dict[str, float]:
    run = LaunchedRun(cluster=cluster, root=root, name=name, settings=("launch.preflight.fabric=true",))
    began = time.time()
    run.launch()
    submitted = time.time()
    seconds = _first_step(run) - began
    run.finish()
    (preflight,) = run.events("preflight")
    (ranks,) = run.events("ranks_started")
    return {
        "seconds": seconds,
        "submitting": submitted - began,
        "ranks started after": ranks["time"] - began,
        "preflight": preflight["seconds"],
    }


def _bare(cluster: SlurmOfHosts, root: Path, name: str) -> float:
    run = LaunchedRun(cluster=cluster, root=root, name=name)
    settings = ["--set", f"run.name={name}", "--set", f"run.directory={root}/runs"]
    train = [sys.executable, "-m", "launcher", "train", str(root / "run.toml"), *settings]
    began = time.time()
    step = cluster.popen(
        "srun", "-N", str(RANKS), "--ntasks-per-node=1", "--kill-on-bad-exit=1", *train, env={"OMP_NUM_THREADS": "1"}
    )
    seconds = _first_step(run) - began
    step.wait(timeout=120)
    return seconds


def main() -> int:
    """Measures in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    add_output_options(parser)
    options = parser.parse_args()
    launched: list[dict[str, float]] = []
    bare: list[float] = []
    with tempfile.TemporaryDirectory(prefix="launcher-start-") as folder, SlurmOfHosts(num_hosts=RANKS) as cluster:
        root = Path(folder)
        write_run_files(root)
        _bare(cluster, root, "warm-up")  # reads torch from the disk, and prepares the data
        for number in range(options.rounds):
            launched.append(_launched(cluster, root, f"launched-{number}"))
            bare.append(_bare(cluster, root, f"bare-{number}"))
    whole = statistics.median(each["seconds"] for each in launched)
    own = statistics.median(each["seconds"] - alone for each, alone in zip(launched, bare))
    result: dict[str, Any] = {
        "summary": {
            "submission to first step": f"{whole:.1f} s (bound {WHOLE_SECONDS:g})",
            "bare srun to first step": f"{statistics.median(bare):.1f} s",
            "the launcher's own": f"{own:.1f} s (bound {OWN_SECONDS:g})",
            **{
                f"  {name}": f"{statistics.median(each[name] for each in launched):.1f} s"
                for name in ("submitting", "ranks started after", "preflight")
            },
        },
        "met": whole <= WHOLE_SECONDS and own <= OWN_SECONDS,
        "launched": launched,
        "bare": bare,
    }
    return report("launcher_start", result, options)


if __name__ == "__main__":
    sys.exit(main())
