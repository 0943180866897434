"""`mega fabric report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.errors import ConfigError, RunError
from launcher.output import Output

Diagnosis = Annotated[Path | None, typer.Option(help="What `mega fabric diagnose --output` wrote.")]
Sweep = Annotated[Path | None, typer.Option(help="What `mega fabric sweep --output` wrote.")]
Run = Annotated[Path | None, typer.Option(help="Name or folder of a run whose monitor's records to show.")]
Check = Annotated[Path | None, typer.Option(help="What `mega fabric baseline check --json` said.")]
Target = Annotated[Path, typer.Option("--to", help="HTML file to write: it needs nothing else.")]
Png = Annotated[Path | None, typer.Option(help="Write the overview as a picture too.")]
Title = Annotated[str, typer.Option(help="Heading of the page.")]


def report(
    out: Output,
    diagnosis: Diagnosis = None,
    sweep: Sweep = None,
    run: Run = None,
    check: Check = None,
    to: Target = Path("fabric.html"),
    png: Png = None,
    title: Title = "Fabric report",
) -> int:
    """Write what was found and measured as one HTML page: verdicts, curves, pair matrix, topology, waits."""
    from cluster.fabric.report import ReportData, write_report
    from cluster.fabric.sweep import read_sweep
    from launcher.run_record import find_run

    if not any((diagnosis, sweep, run, check)):
        raise ConfigError("a report of what? Give --diagnosis, --sweep, --check or --run")
    folder = find_run(run).root if run else None
    events = _records(folder / "events.jsonl") if folder else []
    expected = [event for event in events if event.get("event") == "communication_time"]
    told = _object(diagnosis) if diagnosis else None
    if told is not None and not {"healthy", "findings"} <= told.keys():
        raise RunError(f"{diagnosis} is not what `mega fabric diagnose --output` writes: it has no verdict")
    if sweep is not None:
        read_sweep(sweep)  # says what is wrong with another file
    data = ReportData(
        title=title,
        verdict=told or _verdict_of(events),
        sweep=_object(sweep) if sweep else None,
        waits=_records(folder / "fabric" / "windows.jsonl") if folder else (),
        predictions=expected[-1]["rows"] if expected else (),
        baseline=_object(check) if check else None,
    )
    to.parent.mkdir(parents=True, exist_ok=True)
    write_report(data, to, png=png)
    out.say(f"Wrote {to}" + (f" and {png}." if png else "."))
    out.result({"path": str(to), "png": None if png is None else str(png)})
    return 0


def _verdict_of(events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the run's own watch has found, in the form of a diagnosis."""
    findings = [event for event in events if event.get("event") == "fabric_finding"]
    return {"healthy": not findings, "findings": findings} if events else None


def _object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is no JSON ({error}): write it with --output, or with --json > FILE") from error
    if not isinstance(data, dict):
        raise RunError(f"{path} holds no JSON object: write it with --output, or with --json > FILE")
    return data


def _records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that may lack, or whose last line may be cut short."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
