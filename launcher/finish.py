"""What one process does with a run's weights once they are trained: sample text, and export. Used by the verbs."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config import RunConfig
from megamodel.convert.config import ExportConfig
from megamodel.convert.origin import read_origin
from megamodel.generate.config import GenerateConfig
from megamodel.train.run_directory import RunDirectory
from parallel.checkpoint.directory import MANIFEST, CheckpointDirectory

if TYPE_CHECKING:
    from megamodel.convert.export import ExportResult
    from megamodel.generate.text import GeneratedText
    from megamodel.train.restore import RestoredDecoder


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run with the weights of one checkpoint in memory."""

    directory: RunDirectory
    config: RunConfig
    restored: RestoredDecoder


def open_trained(directory: RunDirectory, config: RunConfig, *, step: int | None = None) -> TrainedRun:
    """The run with the weights of `step`, or of its newest good checkpoint; a run that still trains is not disturbed.

    Raises ModelError where there is no such checkpoint, CorruptCheckpointError where the one asked for is damaged.
    """
    from megamodel.train.restore import restore_decoder

    return TrainedRun(directory=directory, config=config, restored=restore_decoder(directory, step=step))


def sample(
    run: TrainedRun, options: GenerateConfig, *, on_text: Callable[[int, str], None] | None = None
) -> list[GeneratedText]:
    """Continues the prompts of `options`, on the device that the run is configured for."""
    from megamodel.generate.text import generate_text
    from parallel.world import choose_device

    return generate_text(
        run.restored.decoder.to(choose_device(run.config.run.device, 0)),
        options,
        tokenizer_path=run.directory.tokenizer,
        end_of_text=run.config.data.tokenizer.end_of_text,
        on_text=on_text,
    )


def export(run: TrainedRun, options: ExportConfig, *, path: Path | None = None) -> ExportResult:
    """Writes the weights as a folder for Hugging Face transformers, at `path` or in the run's `export/hf`.

    Raises ParityError (exit code 3) when the reloaded export computes something else; nothing is left then.
    """
    from megamodel.convert.export import export_hf

    config, restored = run.config, run.restored
    result = export_hf(
        restored.config,
        restored.decoder,
        path or run.directory.export / "hf",
        tokenizer_path=run.directory.tokenizer,
        record={
            "run": config.run.name,
            "step": restored.step,
            **restored.record["progress"],
            **restored.record["record"],
            "data": config.data.source,
            "train": config.train.model_dump(mode="json", include={"global_batch_size", "precision", "optimizer"}),
        },
        options=options,
        end_of_text=config.data.tokenizer.end_of_text,
        title=config.run.name,
        origin=_origin(run.directory, restored.step, options),
    )
    run.directory.append_event("export", step=restored.step, path=str(result.path))
    return result


def newest_is_exported(directory: RunDirectory, options: ExportConfig) -> bool:
    """Whether the run's export is of its newest checkpoint, and as `options` want it."""
    complete = CheckpointDirectory(directory.checkpoints).list()
    return bool(complete) and read_origin(directory.export / "hf") == _origin(directory, complete[-1].step, options)


def finished_step(config: RunConfig) -> int | None:
    """The step at which the run of `config` has finished; None where there is something to train, or to export."""
    directory = RunDirectory(config.run_directory)
    complete = CheckpointDirectory(directory.checkpoints).list()
    if not complete or complete[-1].step < config.train.steps:
        return None
    is_exported = config.export.format == "none" or newest_is_exported(directory, config.export)
    return complete[-1].step if is_exported else None


def newest_is_sampled(directory: RunDirectory) -> bool:
    """Whether the run's events hold text that its newest checkpoint wrote."""
    complete = CheckpointDirectory(directory.checkpoints).list()
    if not complete or not directory.events.exists():
        return False
    for line in directory.events.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # half a line of a killed process
            event = json.loads(line)
            if event["event"] == "sample" and event["step"] == complete[-1].step:
                return True
    return False


def _origin(directory: RunDirectory, step: int, options: ExportConfig) -> dict[str, Any]:
    """What tells one export of a run from another: the checkpoint, by its manifest, and how it was written."""
    origin: dict[str, Any] = {"step": step, **options.model_dump(mode="json", exclude={"format"})}
    # A run that trains on may have removed it by now: then nothing can be said to be equal to it.
    with contextlib.suppress(FileNotFoundError):
        manifest = CheckpointDirectory(directory.checkpoints).path_of(step) / MANIFEST
        origin["manifest_sha256"] = hashlib.sha256(manifest.read_bytes()).hexdigest()
    return origin
