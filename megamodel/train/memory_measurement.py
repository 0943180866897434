"""Memory of one step as the tracker sees it, to be held against the formula. For CPUs, uncompiled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megamodel.model.config import ModelConfig
from megamodel.train.activation_memory import offload_of
from megamodel.train.batch import TokenBatch
from megamodel.train.build import build_model, compute_dtype
from megamodel.train.communication_facts import RunShape
from megamodel.train.config import TrainConfig
from megamodel.train.memory import MemoryPrediction, predict_memory
from megamodel.train.optimizer import Optimizers, build_optimizers
from megamodel.train.step import TrainStep
from parallel.config import ParallelConfig
from parallel.data_parallel import DataParallel
from parallel.memory_tracker import MemoryTracker, MemoryUse
from parallel.mesh import Mesh

_STEPS = 2  # optimizer state comes with the first


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """The fullest moment of a step on one rank, and what the formula says of it."""

    peak: MemoryUse
    predicted: MemoryPrediction

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.peak.total / self.predicted.peak


def measure_step(
    model: ModelConfig, train: TrainConfig, parallel: ParallelConfig, *, mesh: Mesh, seq_len: int
) -> MeasuredStep:
    """Builds the model and takes two steps on random tokens; the second one counts. A collective over the world.

    What `mode = "offload"` has moved is not counted, as if the host's memory were not that of this CPU.
    """
    config = train.model_copy(update={"compile": "off"})
    optimizers: list[Optimizers] = []
    engines: list[DataParallel] = []
    tracker = MemoryTracker(lambda: _kinds(engines, optimizers))
    with tracker:
        built = build_model(model, config, parallel, mesh=mesh, seed=0, seq_len=seq_len)
        engines.append(built.data_parallel)
        for part in built.parts:
            if (offload := offload_of(part)) is not None:
                offload.on_moved = tracker.leave_out
        optimizers.append(
            build_optimizers(built.data_parallel.parameters(), config.optimizer, compute_dtype(config.precision), mesh)
        )
        step = TrainStep(built, optimizers[0], max_norm=config.clip_grad_norm)
        shape = RunShape(
            model=model,
            layout=mesh.layout,
            parallel=parallel,
            train=config,
            seq_len=seq_len,
            rows=built.micro_batch_size,
            document_mask=False,
        )
        batches = _random_batches(shape, mesh)
        for _ in range(_STEPS):
            tracker.reset_peak()
            step(batches, lr_factor=1.0, stop_requested=lambda: False)
    return MeasuredStep(peak=tracker.peak, predicted=predict_memory(shape, pp_rank=mesh.coordinate("pp")))


def _random_batches(shape: RunShape, mesh: Mesh) -> list[TokenBatch]:
    generator = torch.Generator().manual_seed(mesh.data_rank)
    size = (shape.rows, shape.seq_len + 1)
    rows = [torch.randint(shape.model.vocab_size, size, generator=generator) for _ in range(shape.micro_batches)]
    return [
        TokenBatch(tokens_BS=row[:, :-1], labels_BS=row[:, 1:], document_ids_BS=None).share(mesh.axis("cp"))
        for row in rows
    ]


def _kinds(engines: list[DataParallel], optimizers: list[Optimizers]) -> Mapping[str, Iterable[Tensor | None]]:
    parameters = [placed.parameter for engine in engines for placed in engine.parameters()]
    members = [member for found in optimizers for member in found.members]
    states = [value for member in members for state in member.state.values() for value in state.values()]
    return {
        "parameters": parameters,
        "gradients": [parameter.grad for parameter in parameters],
        "optimizer": [value for value in states if isinstance(value, Tensor)],
    }
