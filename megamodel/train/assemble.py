"""A model and what updates it, under the engine that the run asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megamodel.model.config import ModelConfig
from megamodel.train.build import DTYPES, BuiltModel, build_model, compute_dtype
from megamodel.train.config import TrainConfig
from megamodel.train.optimizer import Optimizers, build_optimizers
from megamodel.train.passes import WholeModelPasses
from megamodel.train.sharding_plan import is_gathered_unit
from parallel.config import ParallelConfig
from parallel.deepspeed_engine import DeepSpeedParallel, wrap_deepspeed
from parallel.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """Ready to train."""

    built: BuiltModel
    optimizers: Optimizers


def assemble(
    model: ModelConfig, train: TrainConfig, parallel: ParallelConfig, *, mesh: Mesh, seed: int | None, seq_len: int
) -> Assembled:
    """See `build_model`. A collective."""
    built = build_model(model, train, parallel, mesh=mesh, seed=seed, seq_len=seq_len)
    optimizers = build_optimizers(
        built.data_parallel.parameters(), train.optimizer, compute_dtype(train.precision), mesh
    )
    if parallel.data_engine != "deepspeed" or mesh.world.world_size == 1:
        return Assembled(built=built, optimizers=optimizers)
    (optimizer,) = optimizers.members
    engine = wrap_deepspeed(
        built.decoder,
        mesh=mesh,
        config=parallel.deepspeed,
        optimizer=optimizer,
        compute_dtype=compute_dtype(train.precision),
        reduce_dtype=DTYPES[parallel.reduce_dtype],
        is_unit=is_gathered_unit,
    )
    built = replace(built, data_parallel=engine, passes=WholeModelPasses(engine))
    return Assembled(built=built, optimizers=_EngineUpdates(engine))


class _EngineUpdates(Optimizers):
    """DeepSpeed steps its optimizer itself."""

    def __init__(self, engine: DeepSpeedParallel) -> None:
        super().__init__([])
        self._engine = engine

    def step(self, factor: float) -> None:
        self._engine.step(factor)

    def discard(self) -> None:
        self._engine.discard()
