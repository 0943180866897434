"""What all benchmarks say in the same way: where and how a figure was measured, and one JSON object with all of it."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from cluster.hardware import this_machine

RESULTS = Path(__file__).parent / "results"
CHECK_FAILED = 3
"""Exit code of a benchmark whose bound is not met."""


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """The options that `report` reads."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument(
        "--write", action="store_true", help=f"also write the JSON into {RESULTS.name}/ beside this script"
    )


def report(name: str, result: dict[str, Any], options: argparse.Namespace) -> int:
    """Prints `result` with the circumstances, writes it where asked, and returns the process's exit code.

    result: must hold `summary` (rows of label and value, for people) and `met` (whether every bound is met).
    """
    whole = {"benchmark": name, **result, **_circumstances()}
    text = json.dumps(whole, indent=1)
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(text + "\n")
    if options.json:
        print(text)
    else:
        width = max(len(label) for label in result["summary"])
        for label, value in result["summary"].items():
            print(f"{label:<{width}}  {value}")
        print("every bound is met" if result["met"] else "A BOUND IS NOT MET")
    return 0 if result["met"] else CHECK_FAILED


def _circumstances() -> dict[str, Any]:
    machine = this_machine()
    return {
        "hardware": {
            "cpu": machine.cpu_name,
            "cores": machine.num_cores,
            "memory_gib": round(machine.memory_bytes / 2**30, 1),
            "accelerators": [accelerator.name for accelerator in machine.accelerators],
        },
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in ("torch", "transformers", "accelerate")},
        },
        # The script as a user of the repository would name it, wherever the repository lies.
        "command": shlex.join([*_python(), f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _python() -> list[str]:
    ranks = os.environ.get("WORLD_SIZE", "1")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    return ["python", *(launcher if ranks != "1" else [])]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
