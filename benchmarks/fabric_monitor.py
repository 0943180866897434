"""What the monitor of a run costs: the same training with and without it, in turn, on the same ranks.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/fabric_monitor.py

A pair is one short run of each, in alternating order, with all that a watched run has: the timing of collectives in some
steps, the thread of each rank, the watcher's process. The bound is met where the upper end of the mean cost's confidence
interval lies below it: a noisy measurement proves nothing. Both must compute the same losses, to the last bit.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from reporting import add_output_options, report
from rich.console import Console

from cluster.config import FabricConfig
from cluster.fabric.statistics import contrast, student_quantile
from data_pipeline.config import DataConfig
from data_pipeline.prepare import prepare
from data_pipeline.prepared import PreparedData
from megamodel.model.config import ModelConfig
from megamodel.train.callbacks.base import Callback, StepRecord
from megamodel.train.config import TrainConfig
from megamodel.train.job import TrainingJob
from megamodel.train.run import train_in_world
from parallel.config import ParallelConfig
from parallel.world import World, open_world

BOUND = 0.005
WARMUP_STEPS = 16
"""In these the monitor finds out how often it may look; the first also warm the machine up."""


class _Times(Callback):
    """Losses of all steps, seconds of those after the warm-up."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.accounted: list[float] = []
        """What the monitor itself takes its cost for, as a share of a step, window by window."""

    def on_step(self, record: StepRecord) -> None:
        self.losses.append(record.result.loss)
        if record.step > WARMUP_STEPS:
            self.seconds.append(record.step_time_s)

    @property
    def mean_s(self) -> float:
        """Of a step. Steps in which the machine was away for long count as three usual ones."""
        usual = statistics.median(self.seconds)
        return statistics.fmean(min(seconds, 3 * usual) for seconds in self.seconds)


def make_job(options: argparse.Namespace, scratch: Path) -> TrainingJob:
    """A job without anything that happens in some steps only."""
    corpus: dict[str, Any] = {"source": "text", "path": options.corpus} if options.corpus else {"source": "stdlib"}
    return TrainingJob(
        run_directory=scratch / "run",
        seed=1234,
        device="cpu",
        model=ModelConfig.model_validate({"preset": options.preset}),
        data=DataConfig(
            **corpus,
            cache_directory=options.cache,
            seq_len=options.seq_len,
            held_out_fraction=0.05,
            tokenizer={"vocab_size": options.vocab_size},
        ),
        parallel=ParallelConfig(data_engine=options.engine),
        train=TrainConfig(
            steps=WARMUP_STEPS + options.steps,
            global_batch_size=options.batch_size,
            compile="off",
            validation={"every_steps": 0},
            checkpoint={"every_steps": 0},
            log={"tensorboard": False},
        ),
    )


def one_run(job: TrainingJob, prepared: PreparedData, world: World, monitor: str, scratch: Path) -> _Times:
    """A run from its first step."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        shared = world.broadcast_object(folder)
        times = _Times()
        train_in_world(
            replace(job, run_directory=Path(shared) / "run", fabric=FabricConfig(monitor=monitor, window_steps=2)),
            prepared,
            world,
            console=Console(file=io.StringIO()),
            callbacks=[times],
        )
        world.barrier()
        windows = Path(shared) / "run" / "fabric" / "windows.jsonl"
        lines = windows.read_text().splitlines() if windows.exists() else []
        times.accounted = [json.loads(line)["cost_share"] for line in lines]
        world.barrier()
    return times


def measure(options: argparse.Namespace, world: World, scratch: Path) -> dict[str, Any]:
    """All pairs; every rank takes part."""
    job = make_job(options, scratch)
    prepared = prepare(job.data)
    one_run(job, prepared, world, "off", scratch)
    pairs: list[dict[str, float]] = []
    accounted: list[float] = []
    equal = True
    for number in range(options.pairs):
        order = ("off", "on") if number % 2 == 0 else ("on", "off")
        runs = {monitor: one_run(job, prepared, world, monitor, scratch) for monitor in order}
        equal = equal and runs["on"].losses == runs["off"].losses
        pairs.append({monitor: run.mean_s for monitor, run in runs.items()})
        accounted += runs["on"].accounted
    return summary(options, world, pairs, accounted, equal)


def summary(
    options: argparse.Namespace, world: World, pairs: list[dict[str, float]], accounted: list[float], equal: bool
) -> dict[str, Any]:
    """The trimmed mean over pairs of the logarithm of on / off, with its 95 % interval."""
    cost = contrast([math.log(pair["on"] / pair["off"]) for pair in pairs])
    reach = student_quantile(0.025, cost.dof) * cost.standard_error if cost.count > 1 else math.inf
    low, middle, high = (math.expm1(cost.mean + away) for away in (-reach, 0.0, reach))
    step_s = statistics.median(pair["off"] for pair in pairs)
    own = statistics.median(accounted) if accounted else None
    return {
        "ranks": world.world_size,
        "engine": options.engine,
        "pairs": pairs,
        "cost_share": middle,
        "cost_share_95": [low, high] if math.isfinite(reach) else None,
        "accounted_share": own,
        "step_s": step_s,
        "losses_equal": equal,
        "bound": BOUND,
        "summary": {
            "step without the monitor": f"{step_s * 1e3:.1f} ms",
            "cost of the monitor": f"{middle:+.2%} (95 %: {low:+.2%} to {high:+.2%}, {len(pairs)} pairs)",
            "by its own account": "no window" if own is None else f"{own:.2%}",
            "losses": "equal to the last bit" if equal else "DIFFERENT",
        },
        "met": equal and high <= BOUND,
    }


def main() -> int:
    """Runs it on the ranks that torchrun has started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="moe-tiny")
    parser.add_argument("--engine", default="ddp", choices=["ddp", "fsdp2"])
    parser.add_argument("--corpus", help="folder of text; Python's standard library without it")
    parser.add_argument("--cache", default=str(Path(tempfile.gettempdir()) / "mega-benchmark-cache"))
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=64, help="of a run, after the warm-up")
    parser.add_argument("--pairs", type=int, default=16)
    add_output_options(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open_world(device="cpu") as world:
        result = measure(options, world, Path(folder))
        return report("fabric_monitor", result, options) if world.is_main else 0


if __name__ == "__main__":
    sys.exit(main())
