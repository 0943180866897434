"""How far a run has come, read from its folder while it is written by somebody else."""

from __future__ import annotations

from megamodel.train.run_directory import RunDirectory
from parallel.checkpoint.directory import CheckpointDirectory
from parallel.errors import CheckpointError


def newest_checkpoint(run: RunDirectory, *, known: int = 0) -> int:
    """Step of the newest complete checkpoint; 0 where there is none, and `known` where nobody can look now, as when a file
    system on the network is away."""
    directory = CheckpointDirectory(run.checkpoints)
    try:
        for path in reversed(directory.step_paths()):
            try:
                return directory.read(path).step
            except CheckpointError:
                continue
    except OSError:
        return known
    return 0


def last_step(run: RunDirectory, *, since: float) -> int | None:
    """The last step that the run has recorded. None where nothing was recorded since `since`, in seconds since 1970: then
    what stands there is of an earlier start, and may be forgotten yet."""
    try:
        if run.metrics.stat().st_mtime < since:
            return None
        steps = (line["step"] for line in run.newest_metrics() if isinstance(line.get("step"), int))
        return next(steps, None)
    except OSError:
        return None
