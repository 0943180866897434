"""`make train` from a fresh clone, as a new user does it: how long it takes, and how good the model is.

    python benchmarks/quickstart.py

Clones the committed state into a temporary folder, with compiler caches of its own, and runs `make train` there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reporting import add_output_options, report

REPOSITORY = Path(__file__).resolve().parent.parent
BOUNDS = {"make_train_s": 600.0, "training_s": 240.0, "val_bits_per_byte": 1.40}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder to clone into, and to leave there")
    add_output_options(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quickstart-") as scratch:
        clone = options.keep or Path(scratch) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(clone)], check=True, timeout=60)
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(scratch) / "compiled")}
        environment.pop("PYTHONPATH", None)
        started = time.time()
        subprocess.run(["make", "setup"], cwd=clone, env=environment, check=True, timeout=900, stdout=sys.stderr)
        installed = time.time()
        done = subprocess.run(
            ["make", "train", "ARGS=--json"],
            cwd=clone,
            env=environment,
            check=True,
            timeout=1800,
            stdout=subprocess.PIPE,
            text=True,
        )
        ended = time.time()
        answer = json.loads(done.stdout[done.stdout.index("{") :])
        run = clone / answer["run_dir"]
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        times = {event["event"]: event["time"] for event in events}
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    figures = {
        "make_train_s": ended - started,
        "install_s": installed - started,
        "training_s": times["end"] - times["start"],
        "val_bits_per_byte": answer["val_bits_per_byte"],
    }
    baselines = answer["baselines"]
    result = {
        **figures,
        "baselines": baselines,
        "answer": answer,
        "bounds": BOUNDS,
        "commit": commit,
        "met": all(figures[name] <= bound for name, bound in BOUNDS.items())
        and figures["val_bits_per_byte"] < min(baselines["xz_bits_per_byte"], baselines["gzip_bits_per_byte"]),
        "summary": {
            "make train, install included": f"{figures['make_train_s']:.0f} s (bound {BOUNDS['make_train_s']:.0f} s)",
            "of which install": f"{figures['install_s']:.0f} s",
            "of which training": f"{figures['training_s']:.0f} s (bound {BOUNDS['training_s']:.0f} s)",
            "held-out bits per byte": f"{figures['val_bits_per_byte']:.4f} (bound {BOUNDS['val_bits_per_byte']})",
            "xz -9 of the same bytes": f"{baselines['xz_bits_per_byte']:.4f}",
            "gzip -9 of the same bytes": f"{baselines['gzip_bits_per_byte']:.4f}",
            "tokens/s": f"{answer['tokens_per_s']:,.0f}",
        },
    }
    return report("quickstart", result, options)


if __name__ == "__main__":
    sys.exit(main())
