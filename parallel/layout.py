"""How the ranks of a run are spread over the axes of the mesh. Imports without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from parallel.config import ParallelConfig
from parallel.errors import ParallelError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees along every axis; their product (without ep and expert_tp, which fold the others) is the world."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    expert_tp: int = 1

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return math.prod((self.pp, self.dp_replicate, self.dp_shard, self.cp, self.tp))

    @property
    def edp_shard(self) -> int:
        """Ranks that hold the same part of the same experts."""
        return self.dp_shard * self.cp * self.tp // (self.ep * self.expert_tp)

    @property
    def num_data_ranks(self) -> int:
        """Ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Ranks along each axis, of the dense grid and of the experts' one."""
        return {
            "pp": self.pp,
            "dp_replicate": self.dp_replicate,
            "dp_shard": self.dp_shard,
            "cp": self.cp,
            "tp": self.tp,
            "edp_shard": self.edp_shard,
            "ep": self.ep,
            "expert_tp": self.expert_tp,
        }


@dataclass(frozen=True, kw_only=True)
class LayoutDemands:
    """What a run wants to lay out, in numbers. None: there is no such thing in it."""

    num_layers: int
    num_heads: int
    num_kv_heads: int | None
    """None: attention makes keys and values for every query head (multi-head latent attention)."""
    vocab_size: int
    d_ff: int | None
    """Hidden width of the dense layers."""
    num_experts: int | None
    expert_d_ff: int | None
    """Hidden width of one routed expert."""
    shared_d_ff: int | None
    """Hidden width of the shared experts together."""
    seq_len: int
    """Tokens of a row."""
    global_batch_size: int
    """Samples of an optimizer step."""
    micro_batch_size: int | None
    """Samples of one forward pass on one data rank, where the run says."""
    compile: str = "auto"
    """Whether blocks are compiled: on, off, or auto."""
    optimizer: str = "adamw"
    """adamw or muon."""
    device: str = "auto"
    """cpu, cuda, or auto."""


@dataclass(frozen=True, kw_only=True)
class LayoutProblem:
    """One reason why a layout cannot be."""

    keys: tuple[str, ...]
    """The keys of the run's configuration that it is about, the one to change first."""
    message: str
    """What, where, and the mend, in one line."""
    mends: tuple[tuple[str, Any], ...] = ()
    """(key, value) pairs; setting any one of them cures this reason. `--ranks` stands for the size of the world."""


def resolve_layout(config: ParallelConfig, world_size: int) -> Layout:
    """The degrees of `config` for `world_size` ranks, with dp_shard = -1 replaced by what the other axes leave.

    Raises ParallelError where the degrees do not make up the world; `layout_problems` says more.
    """
    if mismatch := world_mismatch(config, world_size):
        raise ParallelError(f"{mismatch}: change a degree, or start other ranks")
    return filled(config, world_size)


def filled(config: ParallelConfig, world_size: int) -> Layout:
    """`resolve_layout`, but for degrees that need not make up the world: what the other axes leave is rounded down."""
    others = math.prod((config.pp, config.dp_replicate, config.cp, config.tp))
    return Layout(
        pp=config.pp,
        dp_replicate=config.dp_replicate,
        dp_shard=max(1, world_size // others) if config.dp_shard == -1 else config.dp_shard,
        cp=config.cp,
        tp=config.tp,
        ep=config.ep,
        expert_tp=config.expert_tp,
    )


def world_mismatch(config: ParallelConfig, world_size: int) -> str | None:
    """In words how the degrees fail to make up the world; None where they do."""
    degrees = {axis: getattr(config, axis) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}
    rest = degrees["dp_shard"] == -1
    split = {axis: degree for axis, degree in degrees.items() if degree not in (-1, 1)}
    product = math.prod(split.values())
    if product == world_size or (rest and world_size % product == 0):
        return None
    named = " * ".join(f"{axis} {degree}" for axis, degree in split.items()) or "every degree 1"
    total = (
        f"parallel: {named} = {product} ranks declared"
        if len(split) > 1
        else f"parallel: {named}: {product} ranks declared"
    )
    if rest and product < world_size:
        return f"{total}, which do not divide the {world_size} required"
    return f"{total}, {world_size} required"


def micro_batch_size(config: ParallelConfig, layout: Layout, demands: LayoutDemands) -> int:
    """Samples of one forward pass on one data rank: as demanded; else all at once, but one at a time in a pipeline."""
    if demands.micro_batch_size is not None:
        return demands.micro_batch_size
    return 1 if config.pp > 1 else max(1, demands.global_batch_size // layout.num_data_ranks)


def num_micro_batches(config: ParallelConfig, layout: Layout, demands: LayoutDemands) -> int:
    """Forward passes of one data rank in an optimizer step."""
    return demands.global_batch_size // (layout.num_data_ranks * micro_batch_size(config, layout, demands))
