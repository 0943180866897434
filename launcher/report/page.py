"""The page, from a run's folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.fabric.report.figures import render, replace_file
from cluster.fabric.report.page import wait_drawings
from cluster.fabric.report.tables import findings_list
from cluster.fabric.watch.status import FINDINGS_FILE, FOLDER
from launcher.goodput import Ledger, read_ledger
from launcher.goodput.ledger import windows_file
from launcher.jobs.inspection.run_facts import RunFacts, look_at
from launcher.jobs.inspection.status import RunStatus, run_status
from launcher.report import charts, tables
from launcher.report.series import MetricSeries
from megamodel.train.json_lines import read_lines
from megamodel.train.run_directory import RunDirectory

TEMPLATE = Path(__file__).with_name("page.html")
_MOST_WINDOWS = 400
"""Of the monitor: of more, the page shows evenly chosen ones."""


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What was written, and the ledger that it shows."""

    path: Path
    status: RunStatus
    ledger: Ledger | None
    """None where the run has left nothing to tell from."""

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": str(self.path),
            "run_dir": self.status.directory,
            "state": self.status.state,
            "ledger": None if self.ledger is None else self.ledger.as_data(),
        }


def write_report(run: RunDirectory, path: Path | None = None) -> RunReport:
    """Writes one HTML file that needs nothing else, at `path` or as the run's report.html, whole or not at all.

    Raises FabricError where matplotlib is missing (extra `report`). Damaged records are passed over.
    """
    path = path or run.root / "report.html"
    status = run_status(run)
    facts = look_at(run)
    series = MetricSeries()
    ledger = read_ledger(
        run,
        now=None if status.has_ended else time.time(),
        submitted=None if facts.record is None else facts.record.submitted,
        metrics=series.watch(run.read_metrics()),
    )
    page = render(TEMPLATE, _contents(run, status, facts, series, ledger))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page.encode())
    return RunReport(path=path, status=status, ledger=ledger)


def _contents(
    run: RunDirectory, status: RunStatus, facts: RunFacts, series: MetricSeries, ledger: Ledger | None
) -> Mapping[str, Any]:
    """Everything that the template names."""
    starts = ledger.starts if ledger is not None else ()
    verdict = tables.verdict_of(read_lines(run.root / FOLDER / FINDINGS_FILE))
    windows = list(read_lines(windows_file(run.root)))
    sound = [window for window in windows if _is_sound(window)]
    return {
        "title": status.name,
        "subtitle": f"{status.directory}, as of {tables.moment(time.time())}",
        "status": status,
        "figures": tables.summary(status, series, ledger),
        "learning": charts.learning(series, starts),
        "speed": charts.speed(series, starts),
        "shares": tables.shares(ledger),
        "goodput": None if ledger is None else ledger.goodput,
        "history": [] if ledger is None else charts.history(starts, ledger.begin / 1e6, ledger.end / 1e6),
        "starts": tables.starts_table(ledger),
        "failures": tables.failures_table(ledger),
        "findings": findings_list(verdict),
        "waits": wait_drawings(_some(sound), verdict),
        "preflight": tables.preflight_table(facts.events),
        "events": tables.events_table(facts.events),
    }


def _is_sound(window: Mapping[str, Any]) -> bool:
    """Whether the charts can take it: a killed writer leaves odd lines."""
    keys = ("wait_s", "network_s", "late_s")
    return isinstance(window.get("step"), int) and all(
        isinstance(window.get(key), dict) and all(isinstance(value, int | float) for value in window[key].values())
        for key in keys
    )


def _some(windows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    every = max(-(-len(windows) // _MOST_WINDOWS), 1)
    return windows[::every]
