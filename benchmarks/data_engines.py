"""Step times of the data engines beside the same done by hand in bare PyTorch, timed in turn on the same rows.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/data_engines.py

Every loop does forward, backward, clipping and AdamW on the same decoder from the same initial weights; the losses of the
warm-up must agree. DDP and FSDP2 are held against their likes by hand; DeepSpeed's stages stand beside them.
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
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from megamodel.model.config import ModelConfig
from megamodel.model.decoder import Decoder
from megamodel.model.initialization import initialize
from megamodel.train.sharding_plan import is_gathered_unit
from parallel.config import DeepSpeedConfig
from parallel.data_parallel import Units, wrap
from parallel.deepspeed_engine import wrap_deepspeed
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.world import World, open_world

BOUND = 1.05
BY_HAND = {"ddp": "ddp by hand", "fsdp2": "fsdp2 by hand"}
_MAX_NORM = 1.0
_TOLERANCE = 1e-4

Step = Callable[[Tensor], Tensor]


def new_decoder(config: ModelConfig, world: World) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.to_empty(device=world.device)
    initialize(decoder, config, seed=0)
    return decoder


def adamw(model: nn.Module) -> AdamW:
    return AdamW(list(model.named_parameters()), lr=1e-3, fused=True)


def by_hand(engine: str, config: ModelConfig, world: World) -> Step:
    """What one writes without this repository: the mean of the ranks' mean losses."""
    decoder = new_decoder(config, world)
    model: Any = decoder
    if engine == "ddp":
        model = DistributedDataParallel(decoder)
    else:
        for block in decoder.layers.children():
            fully_shard(block)
        fully_shard(decoder)
    optimizer = adamw(decoder)

    def step(rows_BS: Tensor) -> Tensor:
        loss: Tensor = model(rows_BS[:, :-1], rows_BS[:, 1:], None).token_loss_sum / rows_BS[:, 1:].numel()
        loss.backward()
        clip_grad_norm_(decoder.parameters(), _MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach() / world.world_size

    return step


def ours(engine: str, config: ModelConfig, world: World) -> Step:
    """Our engine, called as the training step calls it."""
    mesh = Mesh(world, Layout(dp_shard=world.world_size))
    decoder = new_decoder(config, world)
    if engine.startswith("deepspeed"):
        settings = DeepSpeedConfig.model_validate({"zero_stage": int(engine[-1])})
        sharded = wrap_deepspeed(
            decoder, mesh=mesh, config=settings, optimizer=adamw(decoder), is_unit=is_gathered_unit
        )
        parallel: Any = sharded

        def update() -> None:
            sharded.step(1.0)
    else:
        units = Units(is_unit=is_gathered_unit)
        parallel = wrap([decoder], mesh=mesh, placements={}, engine=engine, units=units)  # type: ignore[arg-type]
        optimizer = adamw(decoder)

        def update() -> None:
            optimizer.step()
            optimizer.zero_grad()

    def step(rows_BS: Tensor) -> Tensor:
        num_valid = rows_BS[:, 1:].numel() * world.world_size
        with parallel.micro_step(is_last=True):
            loss = parallel.module(rows_BS[:, :-1], rows_BS[:, 1:], None).token_loss_sum / num_valid
            parallel.backward(loss)
        parallel.clip_grad_norm(_MAX_NORM)
        update()
        return loss.detach()

    return step


def measure(options: argparse.Namespace, world: World) -> dict[str, Any]:
    """Blocks of steps of each loop in turn; every rank takes part."""
    config = ModelConfig.model_validate({"preset": options.preset})
    loops = {name: by_hand(engine, config, world) for engine, name in BY_HAND.items()}
    loops |= {name: ours(name, config, world) for name in ("ddp", "fsdp2", "deepspeed 1", "deepspeed 2", "deepspeed 3")}
    generator = torch.Generator().manual_seed(world.rank)
    shape = (options.batch_size // world.world_size, options.seq_len + 1)
    rows = [torch.randint(0, config.vocab_size, shape, generator=generator).to(world.device) for _ in range(4)]
    losses = {name: [float(world.all_reduce_sum(step(row))) for row in rows] for name, step in loops.items()}
    seconds: dict[str, list[list[float]]] = {name: [] for name in loops}
    for _ in range(options.blocks):
        for name, step in loops.items():
            world.barrier()
            seconds[name].append([timed(step, rows[index % 4], world) for index in range(options.block_steps)])
    return summarise(options, world, seconds, losses)


def timed(step: Step, rows_BS: Tensor, world: World) -> float:
    begin = time.perf_counter()
    step(rows_BS)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def summarise(
    options: argparse.Namespace, world: World, seconds: dict[str, list[list[float]]], losses: dict[str, list[float]]
) -> dict[str, Any]:
    """Median step times, and their ratios to what is by hand: of all steps, and round by round."""
    medians = {name: statistics.median(s for block in blocks for s in block) for name, blocks in seconds.items()}
    ratios = {}
    summary = {}
    for name, median in medians.items():
        base = BY_HAND.get(name, "ddp by hand")
        pairs = zip(seconds[name], seconds[base], strict=True)
        by_round = [statistics.median(a) / statistics.median(b) for a, b in pairs]
        ratios[name] = {"to": base, "ratio": median / medians[base], "by_round": by_round}
        against = "" if name in BY_HAND.values() else f", {statistics.median(by_round):.3f} x {base}"
        summary[name] = f"{median * 1e3:.0f} ms{against}"
    reference = torch.tensor(losses["ddp by hand"])
    difference = max(float((torch.tensor(found) / reference - 1).abs().max()) for found in losses.values())
    summary["largest relative difference of losses"] = f"{difference:.1e}, bound {_TOLERANCE:g}"
    fast = all(statistics.median(ratios[name]["by_round"]) <= BOUND for name in BY_HAND)
    return {
        "met": fast and difference <= _TOLERANCE,
        "bound": BOUND,
        "ratios": ratios,
        "median_step_s": medians,
        "step_s": seconds,
        "warmup_losses": losses,
        "ranks": world.world_size,
        "device": str(world.device),
        "threads": torch.get_num_threads(),
        "preset": options.preset,
        "batch_size": options.batch_size,
        "seq_len": options.seq_len,
        "summary": summary,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="dense-7m", help="shape of the decoder")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a step, over all ranks")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of steps of each loop")
    parser.add_argument("--block-steps", type=int, default=4, help="steps of a block")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add_output_options(parser)
    options = parser.parse_args()
    with open_world(device=options.device) as world:
        result = measure(options, world)
        return report("data_engines", result, options) if world.is_main else 0


if __name__ == "__main__":
    sys.exit(main())
