"""What of a run is saved, and how a run continues from it."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from megamodel.errors import RefusedError
from megamodel.train.build import BuiltModel
from megamodel.train.job import TrainingJob
from megamodel.train.optimizer import Optimizers
from megamodel.train.run_state import run_state
from parallel.checkpoint.directory import CheckpointInfo
from parallel.checkpoint.store import CheckpointStore, SaveHandle
from parallel.world import World


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands; all that the loop carries from step to step besides weights and optimizer state."""

    step: int = 0
    position: int = 0
    """Global samples consumed."""
    tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


class RunCheckpoints:
    """Saves and restores one run: model, optimizers, random state, progress."""

    def __init__(
        self,
        *,
        store: CheckpointStore,
        world: World,
        built: BuiltModel,
        optimizers: Optimizers,
        job: TrainingJob,
        manifest_hash: str,
    ) -> None:
        self._store = store
        self._world = world
        self._state = run_state(built, optimizers)
        self._identity = identity(job, manifest_hash)
        self._model_config = job.model.model_dump(mode="json")

    def save(self, progress: Progress, *, record: dict[str, Any], asynchronous: bool) -> SaveHandle:
        """A collective. `record` (JSON) tells whoever reads the manifest how the run stood."""
        state = {
            **self._state.entries(),
            "per_rank": {f"rank_{self._world.rank}": {"random": _random_state()}},
        }
        metadata = {
            "progress": asdict(progress),
            "identity": self._identity,
            "model": self._model_config,
            "record": record,
        }
        return self._store.save(progress.step, state, metadata=metadata, asynchronous=asynchronous)

    def restore(self, info: CheckpointInfo) -> Progress:
        """Loads a checkpoint and says where the run stands. A collective.

        Raises `RefusedError` when the checkpoint is of another model, seed or data set: going on would silently train
        something else.
        """
        self._refuse_another_run(info)
        rank_key = f"rank_{self._world.rank}"
        others = {"per_rank": {rank_key: {"random": _random_state()}}}
        loaded = self._state.load(self._store, info, others)
        # Other ranks than at the save: each goes on with a random state of its own.
        if not loaded.missing:
            _restore_random_state(RandomState(*loaded.state["per_rank"][rank_key]["random"]))
        return Progress(**info.manifest.metadata["progress"])

    def _refuse_another_run(self, info: CheckpointInfo) -> None:
        saved = info.manifest.metadata["identity"]
        changed = [
            f"{key} was {saved.get(key)!r} and is {value!r}"
            for key, value in self._identity.items()
            if saved.get(key) != value
        ]
        if changed:
            raise RefusedError(
                f"{info.path} is of another run: {'; '.join(changed)}. Give this run another name "
                "(--set run.name=...), or take back the change"
            )


def identity(job: TrainingJob, manifest_hash: str) -> dict[str, Any]:
    """What must not change between two starts of a run, flat, by its path in the configuration."""
    flat: dict[str, Any] = {
        "run.seed": job.seed,
        "data.seq_len": job.data.seq_len,
        "data.document_mask": job.data.document_mask,
    }
    flat["train.optimizer.name"] = job.train.optimizer.name
    flat["data (hash of the prepared tokens)"] = manifest_hash
    for key, value in job.model.model_dump(exclude={"preset"}).items():
        if isinstance(value, dict):
            flat |= {f"model.{key}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            flat[f"model.{key}"] = value
    return flat


class RandomState(NamedTuple):
    """Generators of one rank. A tuple, which a checkpoint takes as one object."""

    python: Any
    numpy: Any
    torch: Any
    cuda: Any


def _random_state() -> RandomState:
    return RandomState(
        python=random.getstate(),
        numpy=np.random.get_state(),
        torch=torch.get_rng_state().numpy(),
        cuda=torch.cuda.get_rng_state().numpy() if torch.cuda.is_available() else None,
    )


def _restore_random_state(state: RandomState) -> None:
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(torch.from_numpy(state.torch))
    if state.cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(state.cuda))
