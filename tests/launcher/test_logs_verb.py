"""`mega logs`: what ranks have printed, and what they print."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ConfigError, RunError
from launcher.output import Output
from launcher.verbs.logs import logs
from megamodel.train.run_directory import RunDirectory
from tests.launcher.jobs.inspection.test_log_reading import attempt_of
from tests.launcher.jobs.runs import MadeRun

RUN = Path("runs/x")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.chdir(tmp_path)
    return MadeRun(RUN).directory


def shown(**options: Any) -> list[str]:
    text = io.StringIO()
    assert logs(Output(as_json=False, out=text, err=io.StringIO()), Path("x"), **options) == 0
    return text.getvalue().splitlines()


def test_the_newest_attempt(run: RunDirectory) -> None:
    attempt_of(run, 1, job="[0-3] old\n")
    attempt_of(run, 2, job="[0-3] one\n[0-3] two\n", rank_3="of rank 3\n")
    assert shown() == ["[0-3] one", "[0-3] two"]
    assert shown(lines=1) == ["[0-3] two"]
    assert shown(attempt=1) == ["[0-3] old"]
    assert shown(rank=3) == ["of rank 3"]


def test_ranks_of_mega_train_are_folded(run: RunDirectory) -> None:
    attempt_of(run, 1, rank_1="same\n", rank_2="same\nmore\n")
    assert shown() == ["[1-2] same", "[2] more"]
    assert shown(lines=1) == ["[2] more"]


def test_for_programs(run: RunDirectory) -> None:
    attempt_of(run, 1, job="one\ntwo\n")
    text = io.StringIO()
    assert logs(Output(as_json=True, out=text, err=io.StringIO()), Path("x"), lines=1) == 0
    assert json.loads(text.getvalue()) == {"run_dir": "runs/x", "attempt": 1, "lines": ["two"]}
    with pytest.raises(ConfigError, match=r"^--json answers once, and --follow goes on: leave one of them out$"):
        logs(Output(as_json=True, out=text), Path("x"), follow=True)


def test_the_supervisors_own_words(run: RunDirectory) -> None:
    (run.root / "launch").mkdir()
    with pytest.raises(
        RunError, match=r"^runs/x/launch/supervisor.log: is not there; a supervisor on this machine speaks"
    ):
        shown(supervisor=True)
    (run.root / "launch" / "supervisor.log").write_text("one\ntwo\n")
    assert shown(supervisor=True, lines=1) == ["two"]
    with pytest.raises(
        ConfigError, match=r"^--supervisor shows no rank and no attempt: leave --rank and --attempt out$"
    ):
        shown(supervisor=True, rank=1)


@pytest.mark.parametrize("follow", [False, True])
def test_a_run_without_logs_is_told(run: RunDirectory, follow: bool) -> None:
    with pytest.raises(RunError, match=r"^runs/x: has no logs yet; a run of one process speaks on its terminal alone"):
        shown(follow=follow)


class Clock:
    """Time that passes when somebody sleeps; then something happens, or nothing more does and the run has ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *happens: Callable[[], object]) -> None:
        self.now = 0.0
        self._happens = list(happens)
        self.has_ended = False
        monkeypatch.setattr("launcher.verbs.logs.time.monotonic", lambda: self.now)
        monkeypatch.setattr("launcher.verbs.logs.time.sleep", self.sleep)
        monkeypatch.setattr("launcher.jobs.inspection.status.run_status", lambda directory: self)

    def sleep(self, seconds: float) -> None:
        assert not self.has_ended, "it waits though nothing will come"
        self.now += 3.0
        if self._happens:
            self._happens.pop(0)()
        else:
            self.has_ended = True


def test_following_goes_on_over_attempts_until_the_end(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.root / "launch").mkdir()

    def adds(number: int, text: str) -> Callable[[], object]:
        path = run.logs / f"attempt-{number}" / "job.log"
        return lambda: path.write_text((path.read_text() if path.exists() else "") + text)

    Clock(
        monkeypatch,
        lambda: attempt_of(run, 1),  # its ranks have not started yet
        adds(1, "".join(f"{number}\n" for number in range(30))),
        adds(1, "more\nhalf a li"),
        adds(1, "ne\nlast, without an end"),
        lambda: attempt_of(run, 2),
        adds(2, "\n".join(f"new {number}" for number in range(30))),
    )
    assert shown(follow=True) == [
        *map(str, range(10, 30)), "more", "half a line", "last, without an end", *(f"new {n}" for n in range(30))
    ]  # fmt: skip


def test_following_one_attempt_ends_with_it(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt_of(run, 1, job="one\n")
    clock = Clock(monkeypatch, lambda: attempt_of(run, 2, job="two\n"))
    assert shown(follow=True, attempt=1) == ["one"]
    assert not clock.has_ended
    assert shown(follow=True, attempt=2, lines=0) == []


def test_following_folded_logs(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = attempt_of(run, 1, rank_1="a\nb\n", rank_2="a\nb\n")
    Clock(
        monkeypatch,
        lambda: [(folder / f"rank-{rank}.log").write_text("a\nb\nc\n") for rank in (1, 2)],
    )
    assert shown(follow=True, lines=1) == ["[1-2] b", "[1-2] c"]


def test_ctrl_c_ends_it_without_a_traceback(run: RunDirectory) -> None:
    attempt_of(run, 1, job="one\n")
    (run.root / "launch").mkdir()
    run.append_event("start", step=0)
    code = (
        "import sys; from pathlib import Path; from launcher.output import Output; from launcher.run_lock import locked_run\n"
        "from launcher.verbs.logs import logs\n"
        "with locked_run(Path('runs/x'), say=print):\n"
        "    sys.exit(logs(Output(as_json=False), Path('x'), follow=True))"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "one\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (130, "", "")
