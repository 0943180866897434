"""`mega status`: a table of runs, one run, and the object for programs."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ConfigError, RunError
from launcher.output import Output
from launcher.verbs.status import status
from tests.launcher.jobs import runs as made_runs
from tests.launcher.jobs.runs import MadeRun


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(made_runs, "NOW", time.time())
    monkeypatch.setenv("PATH", str(tmp_path))  # no queue


class Terminal(io.StringIO):
    """Takes text as one does."""

    def isatty(self) -> bool:
        return True


def three_runs() -> None:
    done = MadeRun(Path("runs/done"))
    done.event("start", ago=99, step=0)
    done.steps(1, 100, ago=10)
    done.event("end", ago=7200, step=100)
    failed = MadeRun(Path("runs/failed"), total_steps=5000)
    failed.launched(ago=900)
    failed.supervised(
        "failed", ago=80, restarts=2, cause="rank 1 on n3\nwas killed", excluded_hosts={"n3": "its link is slow"}
    )
    waiting = MadeRun(Path("runs/waiting"))
    waiting.directory.config.unlink()
    waiting.launched(ago=3)


def said(**options: Any) -> str:
    text = io.StringIO()
    assert status(Output(as_json=False, out=text), **options) == 0
    return text.getvalue()


def answer(**options: Any) -> dict[str, Any]:
    text = io.StringIO()
    assert status(Output(as_json=True, out=text, err=io.StringIO()), **options) == 0
    data: dict[str, Any] = json.loads(text.getvalue())
    return data


def test_all_runs_in_one_table() -> None:
    three_runs()
    lines = said().splitlines()
    assert lines[0].split() == [
        "run", "state", "step", "loss", "tokens/s", "MFU", "ETA", "restarts", "last", "event",
    ]  # fmt: skip
    assert lines[1].split()[:8] == ["done", "finished", "100/100", "4.0000", "1,081", "40.0%", "–", "0"]
    assert lines[1].endswith("last step made (100), 2 h ago")
    assert lines[2].split()[:3] == ["failed", "failed", "0/5,000"]
    assert lines[3].split()[:2] == ["waiting", "queued"]
    assert lines[4:] == ["failed: rank 1 on n3 was killed"]


def test_a_run_that_has_made_more_steps_than_are_asked_for_now() -> None:
    run = MadeRun(Path("runs/longer"), total_steps=200)
    run.steps(1, 300, ago=10)
    assert "300 (of 200)" in said()


def test_one_run_with_all_that_is_known_of_it() -> None:
    three_runs()
    shown = said(runs=[Path("failed")])
    for line in ("job       slurm 17", "excluded  n3 (its link is slow)", "restarts  2", "hosts     n1, n2"):
        assert line in shown


def test_the_last_event_is_cut_in_the_table_of_many_runs_alone() -> None:
    three_runs()
    words = "rank 1 of 2 on n3 lost the others in an all_reduce of 156544 Float on dp_replicate dp_shard cp"
    run = MadeRun(Path("runs/long"))
    run.event("end", ago=7, step=100)
    run.event("fabric_finding", ago=5, message=words)
    assert f"fabric: {words}, 5 s ago" in said(runs=[Path("long")])
    assert words not in said()
    assert f"fabric: {words[:51]}…, 5 s ago" in said()


def test_one_run_for_programs() -> None:
    three_runs()
    data = answer(runs=[Path("runs/failed")])
    assert {key: data[key] for key in ("state", "step", "restarts", "cause", "excluded_hosts")} == {
        "state": "failed",
        "step": 0,
        "restarts": 2,
        "cause": "rank 1 on n3\nwas killed",
        "excluded_hosts": ["n3"],
    }
    assert answer(runs=[Path("waiting")])["state"] == "queued"


def test_several_runs_for_programs() -> None:
    three_runs()
    assert [run["name"] for run in answer()["runs"]] == ["done", "failed", "waiting"]
    assert [run["name"] for run in answer(runs=[Path("waiting"), Path("done")])["runs"]] == ["waiting", "done"]
    assert answer(directory=Path("elsewhere")) == {"runs": []}


def test_runs_may_lie_elsewhere() -> None:
    MadeRun(Path("other/mine"))
    assert answer(runs=[Path("mine")], directory=Path("other"))["name"] == "mine"


def test_no_runs_are_told() -> None:
    assert said() == "There are no runs in runs: `mega train` or `mega launch` makes one.\n"


def test_an_unknown_run_names_the_nearest() -> None:
    three_runs()
    with pytest.raises(RunError, match=r"^wating: there is no such run; did you mean runs/waiting\?$"):
        said(runs=[Path("wating")])


def test_watching_has_no_single_answer() -> None:
    with pytest.raises(ConfigError, match=r"^--json answers once, and --watch goes on: leave one of them out$"):
        answer(watch=True)


@pytest.mark.parametrize("options", [{"watch": True}, {"refresh": 7.0}])
def test_watching_says_it_again_until_ctrl_c(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    three_runs()
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        MadeRun(Path(f"runs/new{len(waits)}"))
        if len(waits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("launcher.verbs.status.time.sleep", sleep)
    shown = said(**options)
    assert waits == [options.get("refresh", 2.0)] * 3
    assert shown.count("tokens/s") == 3
    assert "new2" in shown


def test_on_a_terminal_the_table_is_drawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    three_runs()

    def sleep(seconds: float) -> None:
        if Path("runs/new").exists():
            raise KeyboardInterrupt
        MadeRun(Path("runs/new"))

    monkeypatch.setattr("launcher.verbs.status.time.sleep", sleep)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    terminal = Terminal()
    assert status(Output(as_json=False, out=terminal), watch=True) == 0
    shown = terminal.getvalue()
    assert shown.count("tokens/s") >= 2
    assert "\x1b[1A" in shown  # the cursor goes up, to draw it over what was there
    assert "new" in shown
    assert "failed: rank 1 on n3 was killed" in shown
