"""How long the command line takes to answer: `mega --help` and `mega config check`, from a cold process to its end.

    python benchmarks/startup.py

Beside them, in turn, an interpreter that does nothing: what no program in this language can be faster than.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from reporting import add_output_options, report

BOUND_S = 0.5
REPOSITORY = Path(__file__).resolve().parent.parent


def seconds_of(command: list[str]) -> float:
    """Wall time of one process. Raises CalledProcessError if it fails: a quick failure is no quick answer."""
    start = time.perf_counter()
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=60)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repeats", type=int, default=10, help="processes of each command after one that is not counted"
    )
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.toml"), help="file to check")
    add_output_options(parser)
    options = parser.parse_args()
    script = Path(sys.executable).with_name("mega")
    mega = [str(script)] if script.exists() else [sys.executable, "-m", "launcher"]
    commands = {
        "mega --help": [*mega, "--help"],
        f"mega config check {options.config}": [*mega, "config", "check", str(options.config)],
        "python -c pass": [sys.executable, "-c", "pass"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for repeat in range(options.repeats + 1):  # the first one reads files into memory and may compile bytecode
        for name, command in commands.items():
            taken = seconds_of(command)
            if repeat:
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    bounded = {name: median for name, median in medians.items() if name.startswith("mega")}
    result = {
        "median_s": medians,
        "bound_s": BOUND_S,
        "met": all(median <= BOUND_S for median in bounded.values()),
        "seconds": seconds,
        "summary": {
            name: f"{median:.3f} s" + (f" (bound {BOUND_S:g} s)" if name in bounded else "")
            for name, median in medians.items()
        },
    }
    return report("startup", result, options)


if __name__ == "__main__":
    sys.exit(main())
