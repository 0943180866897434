"""`mega report`."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from launcher.errors import RunError
from launcher.output import Output
from launcher.verbs.report import report
from tests.launcher.report.samples import full_run


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/x").mkdir(parents=True)
    full_run(Path("runs/x"))


def test_for_people() -> None:
    text = io.StringIO()
    assert report(Output(as_json=False, out=text), Path("x")) == 0
    assert text.getvalue() == "31.7% of the wall-clock time was spent on steps that count.\nWrote runs/x/report.html.\n"
    assert Path("runs/x/report.html").is_file()


def test_for_programs() -> None:
    text = io.StringIO()
    assert report(Output(as_json=True, out=text, err=io.StringIO()), Path("x"), Path("y.html")) == 0
    data = json.loads(text.getvalue())
    assert (data["path"], data["run_dir"], data["state"]) == ("y.html", "runs/x", "finished")
    ledger = data["ledger"]
    assert sum(ledger["seconds"].values()) == pytest.approx(ledger["whole_s"], abs=1e-4)
    assert [failure["lost_steps"] for failure in ledger["failures"]] == [7]


def test_an_unknown_run() -> None:
    with pytest.raises(RunError, match=r"^y: there is no such run"):
        report(Output(as_json=False, out=io.StringIO()), Path("y"))
