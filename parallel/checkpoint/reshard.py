"""A checkpoint written anew by one process, each tensor in one piece and all in as few files as wanted.

No layout needs this to load a checkpoint. It is for what lives long: thousands of small files become a few large ones.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

from parallel.checkpoint.directory import CheckpointDirectory, CheckpointInfo, record_file
from parallel.checkpoint.transfer import WholeEntries, contents, root_cause, write
from parallel.errors import CheckpointError
from parallel.placement import Piece


def reshard(info: CheckpointInfo, root: Path, *, num_files: int = 1) -> CheckpointInfo:
    """Copies a checkpoint to the directory of checkpoints at `root`, in `num_files` files besides the metadata.

    Needs memory for the largest tensor, once for each file. The manifest keeps its record and its number of ranks. The
    source's files are not verified here. Raises `CheckpointError` when it cannot be read or written, or `root` has a
    checkpoint of that step already.
    """
    directory = CheckpointDirectory(root)
    if (there := directory.path_of(info.step)).exists():
        raise CheckpointError(f"{there} is there already; copy to another folder, or remove it")
    entries = WholeEntries(info.path)
    plan = {
        key: None
        if saved is None
        else Piece(
            local=torch.empty(saved.shape, dtype=saved.dtype, device="meta"),
            shape=saved.shape,
            offsets=(0,) * len(saved.shape),
        )
        for key, saved in contents(info.path).items()
    }
    target = directory.begin(info.step)
    try:
        write(target, plan, entries, None, num_files=num_files)
        files = {path.name: record_file(path) for path in target.iterdir()}
        return directory.commit(
            info.step, world_size=info.manifest.world_size, metadata=info.manifest.metadata, files=files
        )
    except (CheckpointException, OSError) as error:
        shutil.rmtree(target, ignore_errors=True)
        raise CheckpointError(f"checkpoint {info.path} was not copied to {root}: {root_cause(error)}") from error
