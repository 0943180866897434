"""One rank of a run of any size, built without memory: mesh, plan, stages and shards by the code that trains."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

from torch.distributed.tensor import DTensor

from megamodel.model.config import ModelConfig
from megamodel.model.size import model_size
from megamodel.train.build import layers_of_rank, plan_parts, spread
from megamodel.train.communication_facts import RunShape
from megamodel.train.config import TrainConfig
from megamodel.train.layout import RunPlan, run_plan
from megamodel.train.memory import MemoryPrediction, predict_memory
from parallel.config import ParallelConfig
from parallel.gradients import placed_parameters
from parallel.mesh import DENSE_AXES, EXPERT_AXES, Mesh
from parallel.simulated_world import open_simulated_world


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """The formula for all ranks at one coordinate of the pipeline."""

    pp_rank: int
    layers: tuple[int, ...]
    peak: int


@dataclass(frozen=True, kw_only=True)
class SimulatedRank:
    """What one rank of the run would hold, in bytes of its device."""

    rank: int
    plan: RunPlan
    axes: dict[str, int]
    """Ranks along each axis that is split; those of the experts' grid where it is another."""
    coordinates: dict[str, int]
    """Where the rank stands on each axis."""
    layers: tuple[int, ...]
    num_parameters: int
    """Of the whole model."""
    built_parameter_bytes: int
    """Bytes of the parameters as they were built here: they are real but for their contents."""
    memory: MemoryPrediction
    stages: tuple[StageMemory, ...]
    """One for each coordinate of the pipeline."""
    seconds: float
    """What the simulation took."""
    host_bytes: int
    """The most memory that this process has held so far."""


def simulate_rank(
    model: ModelConfig,
    train: TrainConfig,
    parallel: ParallelConfig,
    *,
    seq_len: int,
    world_size: int,
    rank: int,
    document_mask: bool,
    on_cuda: bool,
) -> SimulatedRank:
    """Builds rank `rank` of a run on `world_size` ranks. No other process is needed, and none may be there.

    `on_cuda`: the run's devices have fused kernels. Uncompiled; torch.compile keeps fewer activations. Raises
    `ParallelError` where the layout is impossible or there is no such rank.
    """
    started = time.perf_counter()
    plan = run_plan(model, train, parallel, seq_len=seq_len, world_size=world_size)
    shape = RunShape(
        model=model,
        layout=plan.layout,
        parallel=parallel,
        train=train,
        seq_len=seq_len,
        rows=plan.micro_batch_size,
        document_mask=document_mask,
    )
    with open_simulated_world(world_size=world_size, rank=rank) as world:
        mesh = Mesh(world, plan.layout)
        parts, placements = plan_parts(model, train, parallel, mesh=mesh, seq_len=seq_len, compiled=False)
        if parallel.data_engine == "fsdp2":
            placed = spread(parts, placements, train, parallel, mesh=mesh).parameters()
        else:  # other engines take a model with memory only; they change nothing about what is here
            placed = placed_parameters(parts, placements)
        built = sum(_local_bytes(one.parameter) for one in placed)
        axes = _split_axes(plan)
        coordinates = {name: mesh.coordinate(name) for name in axes}
        pp_rank = mesh.coordinate("pp")
    layers_at = [_layers(model, parallel, seq_len, at) for at in range(plan.layout.pp)]
    return SimulatedRank(
        rank=rank,
        plan=plan,
        axes=axes,
        coordinates=coordinates,
        layers=layers_at[pp_rank],
        num_parameters=_num_parameters(model),
        built_parameter_bytes=built,
        memory=predict_memory(shape, pp_rank=pp_rank, fused_kernels=on_cuda),
        stages=tuple(
            StageMemory(pp_rank=at, layers=layers, peak=predict_memory(shape, pp_rank=at, fused_kernels=on_cuda).peak)
            for at, layers in enumerate(layers_at)
        ),
        seconds=time.perf_counter() - started,
        host_bytes=_host_bytes(),
    )


def _split_axes(plan: RunPlan) -> dict[str, int]:
    sizes = plan.layout.axis_sizes
    names = [*DENSE_AXES, *(EXPERT_AXES[2:] if sizes["ep"] * sizes["expert_tp"] > 1 else ())]
    return {name: sizes[name] for name in names if sizes[name] > 1}


def _layers(model: ModelConfig, parallel: ParallelConfig, seq_len: int, pp_rank: int) -> tuple[int, ...]:
    ranges = layers_of_rank(model, parallel, seq_len, pp_rank)
    return tuple(layer for held in ranges for layer in range(held.first, held.end))


def _local_bytes(parameter: object) -> int:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.numel() * local.element_size()  # type: ignore[attr-defined]


def _num_parameters(model: ModelConfig) -> int:
    return model_size(model).total


def _host_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
