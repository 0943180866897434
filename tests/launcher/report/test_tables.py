"""Rows of the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.goodput import Ledger
from launcher.jobs.inspection.status import run_status
from launcher.report import tables
from launcher.report.series import MetricSeries
from launcher.report.tables import MOST_EVENTS, MOST_ROWS
from tests.cluster.fabric.report.samples import STRAGGLER
from tests.launcher.report.samples import full_run


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    root = tmp_path_factory.mktemp("runs") / "x"
    root.mkdir()
    return full_run(root).ledger()


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (0.0123, "12.3 ms"), (7.0, "7.00 s"), (126, "126 s"), (12_000, "3 h 20 min")]
)
def test_spans(seconds: float | None, text: str) -> None:
    assert tables.span(seconds) == text


def test_the_shares_make_up_the_whole(ledger: Ledger) -> None:
    rows = tables.shares(ledger)
    assert sum(row.percent for row in rows) == pytest.approx(100)
    starting = next(row for row in rows if row.words.startswith("starting"))
    assert [words for words, _ in starting.parts] == [
        "processes on hosts", "preflight", "imports, data, model, checkpoint",
        "what the first step took longer, as compiling does",
    ]  # fmt: skip
    assert rows[0].words == "steps that count"
    assert "stopped" not in {row.words for row in rows}  # it took no time
    assert tables.shares(None) == []


def test_starts_and_failures(ledger: Ledger) -> None:
    starts, failures = tables.starts_table(ledger), tables.failures_table(ledger)
    assert starts is not None
    assert failures is not None
    assert [(row[0], row[2], row[4], row[7]) for row in starts.rows] == [
        ("1", "n1, n2", "1 to 39", "rank 1 on n2 died"),
        ("2", "n1, n2", "33 to 52", "stopped by SIGTERM after step 52"),
        ("3", "n1, n2", "53 to 92", "finished"),
    ]
    assert [row[2:6] for row in failures.rows] == [("signal", "2.00 s", "39.1 s", "7")]
    assert tables.starts_table(None) is None
    assert tables.failures_table(None) is None


def test_of_many_the_last_are_shown() -> None:
    events = [{"time": 1.7e9 + number, "event": "attempt", "attempt": number} for number in range(1000)]
    events += [{"time": 1.8e9, "event": "sample", "text": "x"}]
    table = tables.events_table(events)
    assert table is not None
    assert len(table.table.rows) == MOST_EVENTS
    assert table.heading == f"The last {MOST_EVENTS} of 1,000 rows"
    assert table.table.rows[-1][2] == "attempt 999 on its hosts"
    preflights = [{"time": 1.7e9, "event": "preflight", "attempt": number, "ok": True} for number in range(100)]
    checks = tables.preflight_table(preflights)
    assert checks is not None
    assert len(checks.rows) == MOST_ROWS
    assert tables.preflight_table([]) is None
    assert tables.events_table([]) is None


def test_checkpoints_do_not_drown_other_events() -> None:
    saves = [{"time": 1.7e9 + step, "event": "checkpoint", "step": step} for step in range(5, 45, 5)]
    failure = {"time": 1.7e9 + 50, "event": "failure", "message": "rank 1 died"}
    told = tables.events_table([*saves, failure, {"time": 1.7e9 + 60, "event": "checkpoint", "step": 45}])
    assert told is not None
    assert told.heading == "3 rows"
    assert [row[1] for row in told.table.rows] == ["checkpoints", "failure", "checkpoint"]
    assert told.table.rows[0][2].startswith("8 checkpoints of steps 5 to 40, until 20")
    assert told.table.rows[2][2] == "checkpoint of step 45"


def test_restarts_are_those_of_the_whole_run(tmp_path: Path) -> None:
    story = full_run(tmp_path)
    figures = {each.label: each.value for each in tables.summary(run_status(story.run), MetricSeries(), story.ledger())}
    assert figures["restarts"] == "2"


def test_damaged_findings_are_left_out() -> None:
    verdict = tables.verdict_of([{}, STRAGGLER, {"kind": "slow_host"}, {**STRAGGLER, "hosts": 3}])
    assert (verdict["healthy"], len(verdict["findings"])) == (False, 1)
    assert tables.verdict_of([])["healthy"]


def test_names_and_moments() -> None:
    assert tables.names(()) == "–"
    assert tables.names([f"n{number}" for number in range(9)]) == "n0, n1, n2, n3 and 5 more"
    assert tables.moment(1e300) == "–"
