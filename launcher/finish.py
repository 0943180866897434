"""What one process does with a run's weights once they are trained: sample text, and export. Used by the verbs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launcher.config import RunConfig
from megamodel.convert.config import ExportConfig
from megamodel.generate.config import GenerateConfig
from megamodel.train.run_directory import RunDirectory

if TYPE_CHECKING:
    from megamodel.convert.export import ExportResult
    from megamodel.generate.text import GeneratedText
    from megamodel.train.trained import TrainedDecoder

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run with its weights in memory."""

    directory: RunDirectory
    config: RunConfig
    trained: TrainedDecoder
    tokenizer: Path

    @property
    def step(self) -> int:
        """The step of the weights."""
        return self.trained.checkpoint.step


def open_trained(
    directory: RunDirectory, config: RunConfig, *, device: Device | None = None, step: int | None = None
) -> TrainedRun:
    """The run with the weights of `step`, or of its newest good checkpoint, on `device` (default: as configured)."""
    from megamodel.train.trained import load_trained

    trained = load_trained(directory.checkpoints, config.model, device=device or config.run.device, step=step)
    return TrainedRun(directory=directory, config=config, trained=trained, tokenizer=_own_tokenizer(directory, config))


def sample(
    run: TrainedRun, options: GenerateConfig, *, on_text: Callable[[int, str], None] | None = None
) -> list[GeneratedText]:
    """Continues the prompts of `options`."""
    from megamodel.generate.text import generate_text

    return generate_text(
        run.trained.decoder,
        options,
        tokenizer_path=run.tokenizer,
        end_of_text=run.config.data.tokenizer.end_of_text,
        on_text=on_text,
    )


def export(run: TrainedRun, options: ExportConfig, *, path: Path | None = None) -> ExportResult:
    """Writes the weights as a folder for Hugging Face transformers, at `path` or in the run's `export/hf`.

    Raises ParityError (exit code 3) when the reloaded export computes something else; nothing is left then.
    """
    from megamodel.convert.export import export_hf

    manifest = run.trained.checkpoint.manifest
    result = export_hf(
        run.config.model,
        run.trained.decoder,
        path or run.directory.export / "hf",
        tokenizer_path=run.tokenizer,
        record={
            "run": run.config.run.name,
            "step": run.step,
            "tokens": manifest.metadata.get("progress", {}).get("tokens"),
            **manifest.metadata.get("record", {}),
            "data": run.config.data.source,
            "config": run.config.train.model_dump(mode="json", include={"global_batch_size", "precision", "optimizer"}),
        },
        options=options,
        end_of_text=run.config.data.tokenizer.end_of_text,
        title=run.config.run.name,
    )
    run.directory.append_event("export", step=run.step, path=str(result.path))
    return result


def _own_tokenizer(directory: RunDirectory, config: RunConfig) -> Path:
    """The run's own copy of its tokenizer, made at its first use, so that the data set may go."""
    own = directory.root / "tokenizer.json"
    if not own.is_file():
        from data_pipeline.prepare import open_prepared

        partial = own.with_suffix(f".partial-{os.getpid()}")
        shutil.copyfile(open_prepared(config.data, verify=False).tokenizer_path, partial)
        os.replace(partial, own)
    return own
