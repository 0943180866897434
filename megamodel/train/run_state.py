"""Weights and optimizer state of a run as entries of a checkpoint: from our own engines, or from DeepSpeed.

Both give and take the same names and whole shapes, so a run may continue under another engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

from megamodel.train.build import BuiltModel
from megamodel.train.optimizer import Optimizers
from parallel.checkpoint.directory import CheckpointInfo
from parallel.checkpoint.fit import differences
from parallel.checkpoint.pieces import in_pieces
from parallel.checkpoint.store import CheckpointStore, LoadedState
from parallel.checkpoint.training_state import load_training_state, model_tensors, training_state
from parallel.checkpoint.transfer import WholeEntries
from parallel.deepspeed_engine import DeepSpeedParallel, EngineState
from parallel.errors import CheckpointError


class RunState(Protocol):
    """How a checkpoint gets at what is trained. Both methods are collectives over the world."""

    def entries(self) -> dict[str, Any]:
        """`{"model": ..., "optimizer": ...}` of this rank, for `CheckpointStore.save`."""
        ...

    def load(self, store: CheckpointStore, info: CheckpointInfo, others: Mapping[str, Any]) -> LoadedState:
        """Fills model and optimizer; the result has the loaded `others`. Raises `CheckpointError` when it does not fit."""
        ...


def run_state(built: BuiltModel, optimizers: Optimizers) -> RunState:
    """Access to what was built."""
    if isinstance(built.data_parallel, DeepSpeedParallel):
        return _DeepSpeedState(built, built.data_parallel)
    return _PlacedState(built, optimizers)


class _PlacedState:
    """Tensors and DTensors with their placements."""

    def __init__(self, built: BuiltModel, optimizers: Optimizers) -> None:
        self._built = built
        self._optimizers = optimizers.members

    def entries(self) -> dict[str, Any]:
        return training_state(self._tensors(), self._optimizers)

    def load(self, store: CheckpointStore, info: CheckpointInfo, others: Mapping[str, Any]) -> LoadedState:
        loaded = load_training_state(store, info, self._tensors(), self._optimizers, others=others)
        self._built.data_parallel.after_update()
        return loaded

    def _tensors(self) -> Any:
        return model_tensors(self._built.parts, self._built.data_parallel.placements)


class _DeepSpeedState:
    """DeepSpeed gives and takes whole tensors, one parameter at a time."""

    def __init__(self, built: BuiltModel, engine: DeepSpeedParallel) -> None:
        self._engine = engine
        self._buffers = dict(built.decoder.named_buffers())

    def entries(self) -> dict[str, Any]:
        exported = self._engine.export_state()
        return {"model": {**exported.model, **self._buffers}, "optimizer": dict(exported.optimizer)}

    def load(self, store: CheckpointStore, info: CheckpointInfo, others: Mapping[str, Any]) -> LoadedState:
        store.wait()
        saved = WholeEntries(info.path)
        self._refuse_misfit(store, info)
        names = [placed.name for placed in self._engine.parameters()]
        kept = {name: _entries_of(saved, name) for name in names}
        self._engine.import_state(
            EngineState(
                model=_Lazy({name: f"model.{name}" for name in names}, saved.__getitem__),
                optimizer={name: _Lazy(keys, saved.__getitem__) for name, keys in kept.items() if keys},
            )
        )
        for name, buffer in self._buffers.items():
            buffer.copy_(saved[f"model.{name}"])
        ((rank, mine),) = others["per_rank"].items()
        keys = [f"per_rank.{rank}.{key}" for key in mine]
        missing = tuple(key for key in keys if key not in saved)
        found = {key.rpartition(".")[2]: saved[key] for key in keys if key not in missing}
        return LoadedState(state={"per_rank": {rank: {**mine, **found}}}, missing=missing)

    def _refuse_misfit(self, store: CheckpointStore, info: CheckpointInfo) -> None:
        wanted: dict[str, Any] = {
            f"model.{placed.name}": torch.empty(placed.placement.shape, device="meta")
            for placed in self._engine.parameters()
        }
        wanted |= {f"model.{name}": buffer for name, buffer in self._buffers.items()}
        if problems := differences(in_pieces(wanted), store.contents(info)):
            raise CheckpointError(
                f"checkpoint {info.path} does not fit this run: {'; '.join(problems)}. "
                "Continue with the configuration that it was saved with, or start a run of another name"
            )


class _Lazy(Mapping[str, Any]):
    """Values that are read when they are asked for."""

    def __init__(self, keys: Mapping[str, str], read: Callable[[str], Any]) -> None:
        self._keys = keys
        self._read = read

    def __getitem__(self, name: str) -> Any:
        return self._read(self._keys[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _entries_of(saved: WholeEntries, name: str) -> dict[str, str]:
    """The optimizer's entries of one parameter, with their keys in the checkpoint."""
    prefix = f"optimizer.{name}."
    return {key.removeprefix(prefix): key for key in saved if key.startswith(prefix)}
