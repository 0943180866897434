"""How far a run has come, read from its folder while it is written by somebody else."""

from __future__ import annotations

import json
import os

from megamodel.train.run_directory import RunDirectory
from parallel.checkpoint.directory import CheckpointDirectory
from parallel.errors import CheckpointError

# Of metrics.jsonl's end: more than any line is long.
_TAIL_BYTES = 65_536


def newest_checkpoint(run: RunDirectory) -> int:
    """Step of the newest complete checkpoint; 0 where there is none."""
    directory = CheckpointDirectory(run.checkpoints)
    for path in reversed(directory.step_paths()):
        try:
            return directory.read(path).step
        except CheckpointError:
            continue
    return 0


def last_step(run: RunDirectory, *, since: float) -> int | None:
    """The last step that the run has recorded. None where nothing was recorded since `since`, in seconds since 1970: then
    what stands there is of an earlier start, and may be forgotten yet."""
    try:
        with run.metrics.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_mtime < since:
                return None
            file.seek(max(0, status.st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines[:-1]):  # what follows the last line's end is being written
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return None
