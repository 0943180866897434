"""A trained decoder out of a run's checkpoint, on one process: for sampling, export and inspection."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from megamodel.errors import ModelError
from megamodel.model.config import ModelConfig
from megamodel.model.decoder import Decoder
from megamodel.train.run_directory import RunDirectory
from parallel.checkpoint.directory import CheckpointDirectory, CheckpointInfo
from parallel.errors import CheckpointError, CorruptCheckpointError

_ATTEMPTS = 3


@dataclass(frozen=True, kw_only=True)
class RestoredDecoder:
    """Weights of one checkpoint, float32 on the CPU; `record` is what the run wrote into the manifest."""

    config: ModelConfig
    decoder: Decoder
    step: int
    record: dict[str, Any]
    corrupt: tuple[str, ...]
    """Newer checkpoints that were passed over, each with the reason."""


def restore_decoder(run: RunDirectory, *, step: int | None = None) -> RestoredDecoder:
    """The newest good checkpoint of a run, or that of `step`. Changes nothing in the run, which may be training.

    A run that trains meanwhile may remove the checkpoint that is being read; then the next one is taken. Raises
    `ModelError` when there is no such checkpoint, `CorruptCheckpointError` when the one asked for is damaged, and
    `CheckpointError` when one cannot be read.
    """
    directory = CheckpointDirectory(run.checkpoints)
    for _ in range(_ATTEMPTS):
        try:
            return _restore(directory, run, step)
        except _PrunedError:
            continue  # there is a newer one by now
    raise ModelError(
        f"{run.checkpoints}: the run that is training removed {_ATTEMPTS} checkpoints, each while it was read; try again, "
        "or raise train.checkpoint.keep_last or train.checkpoint.every_steps"
    )


class _PrunedError(Exception):
    """A checkpoint was removed while it was read."""


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever fails in reading a checkpoint that is no longer there fails because it is not there."""
    try:
        yield
    except (CheckpointError, CheckpointException, OSError) as error:
        if path.is_dir():
            raise
        raise _PrunedError from error


def _restore(directory: CheckpointDirectory, run: RunDirectory, step: int | None) -> RestoredDecoder:
    """One attempt of `restore_decoder`. Raises `_PrunedError` when another is worth it."""
    info, corrupt = _choose(directory, run, step)
    config = ModelConfig.model_validate(info.manifest.metadata["model"])
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.to_empty(device="cpu")
    # Tied embeddings have one name in a checkpoint, and one here.
    state = {f"model.{name}": tensor for name, tensor in decoder.state_dict().items()}
    with _reading(info.path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as is meant here
        dcp.load(
            state,
            storage_reader=dcp.FileSystemReader(info.path),
            planner=DefaultLoadPlanner(flatten_state_dict=False),
            no_dist=True,
        )
    return RestoredDecoder(
        config=config, decoder=decoder.eval(), step=info.step, record=info.manifest.metadata, corrupt=corrupt
    )


def _choose(
    directory: CheckpointDirectory, run: RunDirectory, step: int | None
) -> tuple[CheckpointInfo, tuple[str, ...]]:
    if step is not None:
        path = directory.path_of(step)
        if not path.is_dir():
            there = ", ".join(str(info.step) for info in directory.list()) or "none"
            raise ModelError(f"{run.checkpoints} has no checkpoint of step {step}; there are: {there}")
        with _reading(path):
            info = directory.read(path)
            directory.verify(info)
        return info, ()
    corrupt = []
    for path in directory.step_paths()[::-1]:
        try:
            with _reading(path):
                info = directory.read(path)
                directory.verify(info)
        except CorruptCheckpointError as error:
            corrupt.append(str(error))
            continue
        return info, tuple(corrupt)
    reason = f"; passed over: {'; '.join(corrupt)}" if corrupt else ""
    raise ModelError(f"{run.checkpoints} has no complete checkpoint yet{reason}; train first: mega train CONFIG")
