"""What `mega train --json` answers: the same keys however the run ended, null where nothing is known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamodel.train.run_directory import RunDirectory

if TYPE_CHECKING:
    from megamodel.train.job import TrainingResult


def ended(result: TrainingResult, export_path: Path | None) -> dict[str, Any]:
    """The answer of a run that has trained, or had nothing left to do. A start that was stopped before its first validation
    answers with the last one of the starts before.
    """
    recorded = _recorded(RunDirectory(result.run_directory), result.steps)
    val_loss, val_bits_per_byte = result.val_loss, result.val_bits_per_byte
    if val_loss is None:
        val_loss, val_bits_per_byte = recorded["val_loss"], recorded["val_bits_per_byte"]
    return {
        "run_dir": str(result.run_directory),
        "steps": result.steps,
        "final_loss": result.final_loss,
        "val_loss": val_loss,
        "val_bits_per_byte": val_bits_per_byte,
        "tokens": result.tokens,
        "tokens_per_s": result.tokens_per_s,
        "baselines": result.baselines,
        "finished": result.finished,
        "export": str(export_path) if export_path else None,
        "communication": [page.as_data() for page in result.communication] or None,
    }


def stopped_before_result(run_directory: Path) -> dict[str, Any]:
    """The answer of a start that a signal ended before its first rank had a result: what lies on the disk."""
    from parallel.checkpoint.directory import CheckpointDirectory

    directory = RunDirectory(run_directory)
    complete = CheckpointDirectory(directory.checkpoints).list()
    steps = complete[-1].step if complete else 0
    return {
        "run_dir": str(run_directory),
        "steps": steps,
        **_recorded(directory, steps),
        "tokens_per_s": None,
        "baselines": {},
        "finished": False,
        "export": None,
        "communication": None,
    }


def _recorded(directory: RunDirectory, steps: int) -> dict[str, Any]:
    """What metrics.jsonl says last of the steps up to `steps`, which are those that are saved."""
    names = {"final_loss": "loss", "val_loss": "val_loss", "val_bits_per_byte": "val_bits_per_byte", "tokens": "tokens"}
    found: dict[str, Any] = dict.fromkeys(names)
    for line in directory.read_metrics():
        if line["step"] <= steps:
            found |= {key: line[name] for key, name in names.items() if name in line}
    return found
