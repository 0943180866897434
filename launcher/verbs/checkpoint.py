"""`mega checkpoint list|verify`."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from launcher.errors import RunError
from launcher.output import Output
from launcher.verb import EXIT_REFUSED
from launcher.verbs.generate import Run, Step

if TYPE_CHECKING:
    from parallel.checkpoint.directory import CheckpointInfo


def list_(out: Output, run: Run) -> int:
    """List a run's complete checkpoints, oldest first. Their files are not read: `verify` does that."""
    from launcher.run_record import find_run
    from parallel.checkpoint.directory import CheckpointDirectory

    checkpoints = find_run(run).checkpoints
    found = [_as_object(info) for info in CheckpointDirectory(checkpoints).list()]
    out.table(
        ("step", "saved", "MiB", "ranks", "path"),
        [
            (
                f"{info['step']}",
                datetime.fromtimestamp(info["saved_at"]).isoformat(sep=" ", timespec="seconds"),
                f"{info['num_bytes'] / 2**20:.1f}",
                f"{info['world_size']}",
                info["path"],
            )
            for info in found
        ],
    )
    out.result({"checkpoints": found})
    return 0


def verify(out: Output, run: Run, step: Step = None) -> int:
    """Read every file of a run's checkpoints, or of one, and compare with its hash; end with 3 if any is corrupt."""
    from launcher.run_record import find_run
    from parallel.checkpoint.directory import CheckpointDirectory, find_problems
    from parallel.errors import CheckpointError

    directory = CheckpointDirectory(find_run(run).checkpoints)
    chosen = [path for path in directory.step_paths() if step is None or path == directory.path_of(step)]
    if not chosen:
        asked = "complete checkpoint" if step is None else f"checkpoint of step {step}"
        raise RunError(f"{directory.root}: there is no {asked} to verify; `mega checkpoint list` shows what is there")
    verdicts = []
    for path in chosen:
        try:
            problems = find_problems(directory.read(path))
        except CheckpointError as error:
            problems = [str(error)]
        verdicts.append({"path": str(path), "good": not problems, "problems": problems})
        out.say(f"{path}: {'good' if not problems else 'CORRUPT: ' + '; '.join(problems)}")
    good = all(verdict["good"] for verdict in verdicts)
    if not good:
        out.say("`mega train` passes over a corrupt checkpoint and continues from the one before.")
    out.result({"ok": good, "checkpoints": verdicts})
    return 0 if good else EXIT_REFUSED


VERBS: dict[str, Callable[..., int]] = {"list": list_, "verify": verify}


def _as_object(info: CheckpointInfo) -> dict[str, Any]:
    return {
        "step": info.step,
        "path": str(info.path),
        "saved_at": info.manifest.saved_at,
        "world_size": info.manifest.world_size,
        "num_bytes": info.num_bytes,
        "metadata": info.manifest.metadata,
    }
