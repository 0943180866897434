"""Draws a run's losses from its metrics.jsonl: the picture in README.md.

python benchmarks/plot_loss.py runs/quickstart docs/images/quickstart-loss.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib import pyplot

from megamodel.train.run_directory import RunDirectory


def plot(run: Path, picture: Path) -> None:
    """Training and held-out loss in nats a token over tokens, and held-out bits per byte beside it."""
    lines = list(RunDirectory(run).read_metrics())
    steps = {line["step"]: line for line in lines if "loss" in line}
    validations = [line for line in lines if "val_loss" in line]
    figure, axis = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    tokens = [line["tokens"] / 1e6 for line in steps.values()]
    axis.plot(tokens, [line["loss"] for line in steps.values()], linewidth=0.8, label="training")
    held_out = [steps[line["step"]]["tokens"] / 1e6 for line in validations]
    axis.plot(held_out, [line["val_loss"] for line in validations], "o-", label="held-out files")
    for x, line in zip(held_out, validations, strict=True):
        axis.annotate(
            f"{line['val_bits_per_byte']:.2f} bits/byte", (x, line["val_loss"]), (4, 8), textcoords="offset points"
        )
    axis.set_xlabel("million tokens")
    axis.set_ylabel("loss, nats a token")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
