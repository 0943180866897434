"""`mega checkpoint list|verify|reshard`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.errors import RunError
from launcher.output import Output
from launcher.verb import EXIT_FAILED, EXIT_REFUSED
from launcher.verbs.generate import Run, Step

if TYPE_CHECKING:
    from parallel.checkpoint.directory import CheckpointDirectory, CheckpointInfo

Target = Annotated[Path, typer.Option("--to", help="Folder to write the copy into, as step-NNNNNNNN.")]
Files = Annotated[int, typer.Option("--files", min=1, help="How many files to write all tensors into.")]


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
    """Read every file of a run's checkpoints, or of one, and compare with its hash; end with 3 if any is corrupt.

    One that cannot be read is no corrupt one: it alone ends the command with 1.
    """
    from launcher.run_record import find_run
    from parallel.checkpoint.directory import CheckpointDirectory

    directory = CheckpointDirectory(find_run(run).checkpoints)
    chosen = [path for path in directory.step_paths() if step is None or path == directory.path_of(step)]
    verdicts = []
    for path in chosen:
        if (verdict := _examine(directory, path)) is not None:
            verdicts.append(verdict)
            out.say(f"{path}: {verdict.words}")
    if not verdicts:
        asked = "complete checkpoint" if step is None else f"checkpoint of step {step}"
        raise RunError(f"{directory.root}: there is no {asked} to verify; `mega checkpoint list` shows what is there")
    code = max(verdict.code for verdict in verdicts)
    if code == EXIT_REFUSED:
        out.say("`mega train` passes over a corrupt checkpoint and continues from the one before.")
    out.result({"ok": code == 0, "checkpoints": [verdict.as_object() for verdict in verdicts]})
    return code


def reshard(out: Output, run: Run, target: Target, step: Step = None, files: Files = 1) -> int:
    """Copy a checkpoint into a few large files, each tensor in one piece; end with 3 if it is corrupt.

    Training needs no such copy: it resumes from any checkpoint under any layout, on any number of ranks.
    """
    from launcher.run_record import find_run
    from parallel.checkpoint.directory import CheckpointDirectory
    from parallel.checkpoint.reshard import reshard as copy_anew

    directory = CheckpointDirectory(find_run(run).checkpoints)
    complete = [info for info in directory.list() if step is None or info.step == step]
    if not complete:
        asked = "complete checkpoint" if step is None else f"complete checkpoint of step {step}"
        raise RunError(f"{directory.root}: there is no {asked} to copy; `mega checkpoint list` shows what is there")
    source = complete[-1]
    directory.verify(source)
    copied = copy_anew(source, target, num_files=files)
    out.say(f"Wrote {copied.path}: {copied.num_bytes / 2**20:.1f} MiB in {len(copied.manifest.files)} files.")
    out.result(_as_object(copied))
    return 0


@dataclass(frozen=True, kw_only=True)
class _Verdict:
    """What is known of one checkpoint; `code` is the exit code that it asks for."""

    path: Path
    code: int
    problems: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        what = {0: "good", EXIT_FAILED: "cannot be read: ", EXIT_REFUSED: "CORRUPT: "}[self.code]
        return what + "; ".join(self.problems)

    def as_object(self) -> dict[str, Any]:
        good = None if self.code == EXIT_FAILED else self.code == 0  # null: not known
        return {"path": str(self.path), "good": good, "problems": self.problems}


def _examine(directory: CheckpointDirectory, path: Path) -> _Verdict | None:
    """Reads all of a checkpoint. None where it is gone: a run that trains on removes its old ones."""
    from parallel.checkpoint.directory import find_problems
    from parallel.errors import CheckpointError, CorruptCheckpointError

    try:
        problems = tuple(find_problems(directory.read(path)))
    except CorruptCheckpointError as error:
        return _Verdict(path=path, code=EXIT_REFUSED, problems=(str(error),))
    except CheckpointError as error:
        return _Verdict(path=path, code=EXIT_FAILED, problems=(str(error),)) if path.exists() else None
    return _Verdict(path=path, code=EXIT_REFUSED if problems else 0, problems=problems)


VERBS: dict[str, Callable[..., int]] = {"list": list_, "verify": verify, "reshard": reshard}


def _as_object(info: CheckpointInfo) -> dict[str, Any]:
    return {
        "step": info.step,
        "path": str(info.path),
        "saved_at": info.manifest.saved_at,
        "world_size": info.manifest.world_size,
        "num_bytes": info.num_bytes,
        "metadata": info.manifest.metadata,
    }
