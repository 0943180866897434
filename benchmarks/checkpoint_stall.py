"""How long an asynchronous save holds a training step up, as a fraction of what a blocking save takes.

    python benchmarks/checkpoint_stall.py
    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/checkpoint_stall.py

Both kinds of save are timed in turn, in one run, on one state (a model and its AdamW moments, fp32). The stall is the
time for which a save keeps the training thread: `save` itself, and what the next optimizer step waits for the copy of
its parameters. That is what the bound is about. Also printed: by how much that next step, with its save, was longer than a
step without one (`step_excess`), and how much longer the steps beside a save take (`background_step_ratio`): where training
uses every core, the thread that copies, hashes and writes shares them with it, at the lowest priority.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from reporting import add_output_options, report
from torch import nn

from parallel.checkpoint.store import CheckpointStore
from parallel.checkpoint.training_state import model_tensors, training_state
from parallel.config import ParallelConfig
from parallel.data_parallel import DataParallel, Units, wrap
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.world import World, open_world

BOUND = 0.05
WIDTH = 512


class Training:
    """A stack of square layers with as many parameters as asked for, and its AdamW."""

    def __init__(self, world: World, engine: Any, num_parameters: int) -> None:
        layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(max(1, round(num_parameters / WIDTH**2)))]
        self.parallel: DataParallel = wrap(
            [nn.Sequential(*layers).to(world.device)],
            mesh=Mesh(world, Layout(dp_shard=world.world_size)),
            placements={},
            engine=engine,
            units=Units(is_unit=lambda name, module: isinstance(module, nn.Linear)),
        )
        self.optimizer = torch.optim.AdamW(self.parallel.model.parameters())
        self._batch = torch.randn(256, WIDTH, device=world.device)

    def step(self) -> float:
        """Seconds of one training step."""
        start = time.perf_counter()
        with self.parallel.micro_step(is_last=True):
            self.parallel.module(self._batch).pow(2).mean().backward()
        self.parallel.clip_grad_norm(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def state(self) -> dict[str, Any]:
        return training_state(model_tensors([self.parallel.model], {}), [self.optimizer])


def measure(world: World, training: Training, repeats: int) -> dict[str, Any]:
    blocking, stalls, excesses, quiet_steps, busy_steps = [], [], [], [], []
    with tempfile.TemporaryDirectory(prefix="checkpoint-stall-") as scratch:
        root = Path(world.broadcast_object(scratch))
        training.step()  # gives the optimizer its moments
        with CheckpointStore(root, world, keep_last=1) as store:
            store.overlap_with([training.optimizer])
            for repeat in range(repeats + 1):  # the first is a warm-up: it makes the buffers and is reported apart
                for asynchronous in (False, True):
                    quiet_steps.append(training.step())
                    world.barrier()
                    start = time.perf_counter()
                    handle = store.save(
                        2 * repeat + asynchronous, training.state(), metadata={}, asynchronous=asynchronous
                    )
                    held = time.perf_counter() - start
                    if not asynchronous:
                        blocking.append(held)
                        continue
                    excesses.append(held + training.step() - quiet_steps[-1])
                    stalls.append(handle.stall_seconds)
                    # Steps are collectives: all ranks must agree that the save is still going on.
                    while not all(world.all_gather_object(handle.done)):
                        busy_steps.append(training.step())
            num_bytes = store.directory.list()[-1].num_bytes
        world.barrier()
    blocking_s, stall_s, excess_s = (statistics.median(values[1:]) for values in (blocking, stalls, excesses))
    return {
        "stall_ratio": stall_s / blocking_s,
        "bound": BOUND,
        "blocking_s": blocking_s,
        "stall_s": stall_s,
        "first_stall_ratio": stalls[0] / blocking_s,
        "step_excess_ratio": excess_s / blocking_s,
        "background_step_ratio": statistics.median(busy_steps) / statistics.median(quiet_steps) if busy_steps else None,
        "step_s": statistics.median(quiet_steps),
        "checkpoint_bytes": num_bytes,
        "all_blocking_s": blocking,
        "all_stall_s": stalls,
        "all_step_excess_s": excesses,
    }


def in_words(result: dict[str, Any]) -> dict[str, str]:
    return {
        "blocking save": f"{result['blocking_s']:.3f} s for {result['checkpoint_bytes'] / 2**20:.0f} MiB",
        "the training thread waits": f"{result['stall_ratio']:.4f} of that (bound {BOUND:g})",
        "the step beside it takes longer by": f"{result['step_excess_ratio']:.3f} of that",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parameters", type=int, default=16_000_000, help="parameters of the model (12 bytes each on disk)"
    )
    parser.add_argument("--engine", choices=["ddp", "fsdp2"], default=ParallelConfig().data_engine)
    parser.add_argument("--repeats", type=int, default=7, help="saves of each kind after the warm-up")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add_output_options(parser)
    options = parser.parse_args()
    with open_world(device=options.device) as world:
        training = Training(world, options.engine, options.parameters)
        measured = measure(world, training, options.repeats)
        parameters = sum(parameter.numel() for parameter in training.parallel.model.parameters())
        if not world.is_main:
            return 0
        result = {
            **measured,
            "parameters": parameters,
            "ranks": world.world_size,
            "engine": options.engine if world.world_size > 1 else "none",
            "met": measured["stall_ratio"] <= BOUND,
            "summary": in_words(measured),
        }
        suffix = "1_rank" if world.world_size == 1 else f"{world.world_size}_ranks"
        return report(f"checkpoint_stall_{suffix}", result, options)


if __name__ == "__main__":
    sys.exit(main())
