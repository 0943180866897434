"""The decoder of a run, read from its checkpoints by one process, whether the run still trains or not."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp

from megamodel.errors import TrainingError
from megamodel.model.config import ModelConfig
from megamodel.model.decoder import Decoder
from parallel.checkpoint.directory import CheckpointDirectory, CheckpointInfo, find_problems
from parallel.world import choose_device


@dataclass(frozen=True, kw_only=True)
class TrainedDecoder:
    """A decoder in fp32 with the weights of one checkpoint, ready for evaluation."""

    decoder: Decoder
    checkpoint: CheckpointInfo


def load_trained(
    checkpoints: Path, model: ModelConfig, *, device: Literal["auto", "cpu", "cuda"], step: int | None = None
) -> TrainedDecoder:
    """The decoder of the checkpoint of `step`, or of the newest good one. Reads only: a run that still trains is not
    disturbed. Raises TrainingError where there is none, and CheckpointError where the one asked for is corrupt.
    """
    info = _choose(CheckpointDirectory(checkpoints), step)
    with torch.device("meta"):
        decoder = Decoder(model)
    decoder.to_empty(device=choose_device(device, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        state: dict[str, Any] = {f"model.{name}": tensor for name, tensor in decoder.state_dict().items()}
        dcp.load(state, storage_reader=dcp.FileSystemReader(info.path), no_dist=True)
    return TrainedDecoder(decoder=decoder.eval(), checkpoint=info)


def _choose(directory: CheckpointDirectory, step: int | None) -> CheckpointInfo:
    complete = directory.list()
    if step is not None:
        chosen = next((info for info in complete if info.step == step), None)
        if chosen is None:
            there = ", ".join(str(info.step) for info in complete) or "none"
            raise TrainingError(f"{directory.root}: no checkpoint of step {step}; there are: {there}")
        directory.verify(chosen)
        return chosen
    good = next((info for info in reversed(complete) if not find_problems(info)), None)
    if good is None:
        raise TrainingError(f"{directory.root}: no complete checkpoint yet; `mega train` saves one")
    return good
