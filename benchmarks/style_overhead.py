"""Step times of every parallel style at degree 1 beside a plain decoder stepped by hand, timed in turn on the same rows.

    python benchmarks/style_overhead.py

A style that is asked for at degree 1 puts nothing into the model: this holds that it stays so, and that neither the cutting,
the placements nor the general training step cost anything where there is nothing to spread. One process, no process group.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from reporting import add_output_options, report
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from megamodel.model.config import ModelConfig
from megamodel.model.decoder import Decoder
from megamodel.model.initialization import initialize
from megamodel.train.assemble import assemble
from megamodel.train.batch import TokenBatch
from megamodel.train.config import TrainConfig
from megamodel.train.step import TrainStep
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.world import World, open_world

BOUND = 1.02
PLAIN = "plain"
STYLES: dict[str, dict[str, Any]] = {
    "tp = 1": {"tp": 1},
    "cp = 1, ring": {"cp": 1, "context_method": "ring"},
    "pp = 1, zbv": {"pp": 1, "pipeline_schedule": "zbv"},
    "ep = 1, expert_tp = 1": {"ep": 1, "expert_tp": 1},
    "dp = 1, ddp": {"data_engine": "ddp"},
    "dp = 1, fsdp2": {"data_engine": "fsdp2"},
}

Step = Callable[[Tensor], float]


def plain(config: ModelConfig, world: World) -> Step:
    """What one writes by hand for one process."""
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.to_empty(device=world.device)
    initialize(decoder, config, seed=0)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, fused=True)

    def step(rows_BS: Tensor) -> float:
        labels_BS = rows_BS[:, 1:]
        terms = decoder(rows_BS[:, :-1], labels_BS)
        loss = (terms.token_loss_sum + terms.router_loss_sum) / labels_BS.numel()
        loss.backward()
        clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return terms.token_loss_sum.item() / labels_BS.numel()

    return step


def styled(parallel: dict[str, Any], config: ModelConfig, world: World, options: argparse.Namespace) -> Step:
    """Our step, with the style's keys set."""
    train = TrainConfig(
        precision="fp32",
        compile="off",
        global_batch_size=options.batch_size,
        optimizer={"lr": 1e-3, "weight_decay": 0.01},
    )
    assembled = assemble(
        config, train, ParallelConfig(**parallel), mesh=Mesh(world, Layout()), seed=0, seq_len=options.seq_len
    )
    train_step = TrainStep(assembled.built, assembled.optimizers, max_norm=1.0)

    def step(rows_BS: Tensor) -> float:
        batch = TokenBatch(tokens_BS=rows_BS[:, :-1], labels_BS=rows_BS[:, 1:], document_ids_BS=None)
        return train_step([batch], lr_factor=1.0, stop_requested=lambda: False).loss

    return step


def measure(options: argparse.Namespace, world: World) -> dict[str, Any]:
    """Rounds in which every loop takes a few steps, in an order that turns."""
    config = ModelConfig.model_validate({"preset": options.preset})
    loops = {PLAIN: plain(config, world)}
    loops |= {name: styled(parallel, config, world, options) for name, parallel in STYLES.items()}
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size, options.seq_len + 1)
    rows = [torch.randint(0, config.vocab_size, shape, generator=generator).to(world.device) for _ in range(4)]
    first_losses = {name: step(rows[0]) for name, step in loops.items()}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    names = list(loops)
    for number in range(options.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begin = time.perf_counter()
            loops[name](rows[number % 4])
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds[PLAIN], strict=True)) for name in STYLES
    }
    difference = max(abs(loss / first_losses[PLAIN] - 1) for loss in first_losses.values())
    return {
        "met": max(ratios.values()) <= BOUND and difference <= 1e-6,
        "bound": BOUND,
        "ratios": ratios,
        "median_step_s": medians,
        "step_s": seconds,
        "largest_relative_difference_of_first_losses": difference,
        "preset": options.preset,
        "batch_size": options.batch_size,
        "seq_len": options.seq_len,
        "device": str(world.device),
        "threads": torch.get_num_threads(),
        "summary": {
            PLAIN: f"{medians[PLAIN] * 1e3:.0f} ms",
            **{name: f"{medians[name] * 1e3:.0f} ms, {ratio:.3f} x plain" for name, ratio in ratios.items()},
            "bound": f"{BOUND:g}",
        },
    }


def main() -> int:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="moe-7m", help="shape of the decoder")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a step")
    parser.add_argument("--rounds", type=int, default=16, help="timed steps of each loop")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add_output_options(parser)
    options = parser.parse_args()
    with open_world(device=options.device) as world:
        return report("style_overhead", measure(options, world), options)


if __name__ == "__main__":
    sys.exit(main())
