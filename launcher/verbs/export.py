"""`mega export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from launcher.output import Output
from launcher.verb import Overrides
from launcher.verbs.generate import Run, Step, tell_passed_over

Format = Annotated[Literal["hf"], typer.Option("--to", help="Format: `hf`, a folder for Hugging Face transformers.")]
Target = Annotated[Path | None, typer.Option("--output", help="Folder to write. Default: export/hf in the run.")]


def export(
    out: Output,
    run: Run,
    to: Format = "hf",
    target: Target = None,
    step: Step = None,
    overrides: Overrides = None,
) -> int:
    """Write a run's model for other tools, and check that they compute the same; else end with 3 and leave nothing."""
    from launcher.config import load_run_config
    from launcher.finish import export as export_run
    from launcher.finish import open_trained
    from launcher.run_record import find_run

    directory = find_run(run)
    config = load_run_config([directory.config], overrides or ()).config
    opened = open_trained(directory, config, step=step)
    tell_passed_over(out, opened)
    result = export_run(opened, config.export, path=target)
    out.say(
        f"Wrote {result.path}: {result.family}, {result.num_parameters:,} parameters; reloaded by transformers, its "
        f"logits differ by at most {result.max_logit_difference:.1e}."
    )
    out.result(
        {
            "path": str(result.path),
            "step": opened.restored.step,
            "family": result.family,
            "num_parameters": result.num_parameters,
            "max_logit_difference": result.max_logit_difference,
            "files": result.files,
        }
    )
    return 0
