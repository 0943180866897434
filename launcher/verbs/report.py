"""`mega report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.output import Output
from launcher.verbs.generate import Run

Target = Annotated[
    Path | None,
    typer.Option("--output", help="HTML file to write: it needs nothing else. Default: report.html in the run."),
]


def report(out: Output, run: Run, output: Target = None) -> int:
    """Write a run as one HTML page: loss, speed, where its time went, restarts with their causes, fabric, memory."""
    from launcher.run_record import find_run

    directory = find_run(run, launched=True)
    from launcher.report import write_report

    written = write_report(directory, output)
    if written.ledger is not None and written.ledger.goodput is not None:
        out.say(f"{written.ledger.goodput:.1%} of the wall-clock time was spent on steps that count.")
    out.say(f"Wrote {written.path}.")
    out.result(written.as_data())
    return 0
