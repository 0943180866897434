"""`mega train --simulate-world`: what one rank of a large run would hold, worked out on this machine."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.errors import ConfigError
from launcher.output import Output

if TYPE_CHECKING:
    from megamodel.train.simulate import SimulatedRank

SimulateWorld = Annotated[
    int | None,
    typer.Option(
        "--simulate-world",
        min=1,
        metavar="N",
        help="Train nothing: build one of N ranks without memory, and say what it would hold.",
    ),
]
SimulateRank = Annotated[
    int | None,
    typer.Option("--simulate-rank", min=0, metavar="R", help="With --simulate-world: which rank. Default: 0."),
]

_ROWS = ("parameters", "gradients", "optimizer", "activations", "working", "peak")


def simulate(
    out: Output, files: list[Path], overrides: list[str] | None, world_size: int | None, rank: int | None
) -> int:
    """The answer of `mega train` where it is asked to simulate. Raises ConfigError on options that make no sense together."""
    from launcher.config import load_run_config

    if world_size is None:
        raise ConfigError("--simulate-rank says which rank of a simulated world: give --simulate-world N too")
    if "RANK" in os.environ:
        raise ConfigError("--simulate-world needs one process, and this is a rank of a run: start it without torchrun")
    rank = rank or 0
    if rank >= world_size:
        raise ConfigError(f"--simulate-rank {rank}: ranks of a world of {world_size} count from 0 to {world_size - 1}")
    try:
        config = load_run_config(files, overrides or (), num_ranks=world_size).config
    except ConfigError as error:  # the number of ranks is that of the simulated world
        problems = tuple(problem.replace("--ranks", "--simulate-world") for problem in error.problems)
        raise ConfigError(str(error).replace("--ranks", "--simulate-world"), problems) from error
    from megamodel.train.simulate import simulate_rank

    simulated = simulate_rank(
        config.model,
        config.train,
        config.parallel,
        seq_len=config.data.seq_len,
        world_size=world_size,
        rank=rank,
        document_mask=config.data.document_mask,
        on_cuda=config.run.device != "cpu",
    )
    _say(out, simulated, world_size)
    out.result({"world_size": world_size, **asdict(simulated)})
    return 0


def _say(out: Output, simulated: SimulatedRank, world_size: int) -> None:
    layout = ", ".join(f"{name} {size:,}" for name, size in simulated.axes.items())
    plan = simulated.plan
    out.say(f"{simulated.num_parameters:,} parameters on {world_size:,} ranks: {layout or 'one rank'}")
    out.say(
        f"a step of one data rank: {plan.num_micro_batches} micro batches of {plan.micro_batch_size}; expected idle share "
        f"{plan.expected_bubble:.1%}"
    )
    place = ", ".join(f"{name} {at}" for name, at in simulated.coordinates.items())
    out.say(f"rank {simulated.rank} ({place or 'alone'}) holds the layers {_ranges(simulated.layers)}")
    out.table(
        ("bytes per rank", "GiB", "what is in it"),
        [(name, f"{getattr(simulated.memory, name) / 2**30:.3f}", _MEANING[name]) for name in _ROWS],
    )
    fullest = max(simulated.stages, key=lambda stage: stage.peak)
    out.say(
        f"fullest along the pipeline: coordinate {fullest.pp_rank}, {fullest.peak / 2**30:.3f} GiB at its peak "
        f"(--simulate-rank {fullest.pp_rank * (world_size // len(simulated.stages))}); "
        "tensors only, without torch.compile (which keeps less) and what an allocator adds"
    )
    out.say(
        f"simulated in {simulated.seconds:.1f} s with {simulated.host_bytes / 2**30:.2f} GiB of this machine's memory"
    )


_MEANING = {
    "parameters": "this rank's shards",
    "gradients": "when the step updates; unsharded while micro batches accumulate",
    "optimizer": "AdamW's moments, Muon's momentum",
    "activations": "kept for the backward, of all micro batches in flight",
    "working": "gathered parameters, the loss, one block's backward, what is sent",
    "peak": "the fullest moment; not everything is there at once",
}


def _ranges(layers: tuple[int, ...]) -> str:
    """0-3, 8-11"""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
