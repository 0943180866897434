"""Logs of ranks, whole or while they grow."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.jobs.inspection import log_reading
from launcher.jobs.inspection.log_reading import (
    FoldedLogs,
    GrowingLog,
    all_lines,
    log_from_end,
    logs_of,
    missing_logs,
    newest_attempt,
)
from megamodel.train.run_directory import RunDirectory


def attempt_of(run: RunDirectory, number: int, **logs: str) -> Path:
    """The folder of an attempt with logs, by name: `job` or `rank_N`."""
    folder = run.logs / f"attempt-{number}"
    folder.mkdir(parents=True)
    for name, text in logs.items():
        (folder / f"{name.replace('_', '-')}.log").write_text(text)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "x")


def read(run: RunDirectory, attempt: int, rank: int | None = None, lines: int | None = None) -> list[str]:
    log = logs_of(run, attempt, rank, lines=lines)
    assert log is not None
    return list(all_lines(log))


def test_a_log_is_read_on_from_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    log = GrowingLog(path)
    assert log.more() == []
    path.write_bytes(b"one\ntw")
    assert log.more() == ["one"]
    assert log.more() == []
    with path.open("ab") as file:
        file.write(b"o\nthree \x1b[31mred\x1b[0m \xff\nhalf")
    assert log.more() == ["two", "three red �"]
    assert log.rest() == ["half"]


def test_the_jobs_log_comes_before_those_of_ranks(run: RunDirectory) -> None:
    attempt_of(run, 2, job="[0-1] x\n", rank_0="x\n", rank_1="x\n")
    assert read(run, 2) == ["[0-1] x"]
    assert read(run, 2, rank=1) == ["x"]
    assert newest_attempt(run) == 2


def test_without_one_the_logs_of_ranks_are_folded(run: RunDirectory) -> None:
    texts = {f"rank_{rank}": f"loading\nI am rank {rank}\n" + "x\n" * (rank == 2) + "done" for rank in (1, 2, 3)}
    attempt_of(run, 1, **texts)
    assert read(run, 1) == ["[1-3] loading", "[1-3] I am rank N", "[2] x", "[1-3] done"]


def test_lines_that_come_later_are_folded_too(run: RunDirectory) -> None:
    folder = attempt_of(run, 1, rank_1="a\n", rank_2="")
    now = [0.0]
    log = FoldedLogs({rank: folder / f"rank-{rank}.log" for rank in (1, 2)}, clock=lambda: now[0])
    assert log.more() == []
    (folder / "rank-2.log").write_text("a\nb\n")
    assert log.more() == []  # another one may say the same yet
    now[0] = 1.0
    assert log.more() == ["[1-2] a", "[2] b"]
    assert log.rest() == []


@pytest.mark.parametrize("lines", [0, 1, 2, 3, 7, 20, 1000])
@pytest.mark.parametrize("chunk", [4, 64, 1 << 18])
@pytest.mark.parametrize("ending", ["\n", ""])
def test_the_last_lines_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: int, chunk: int, ending: str
) -> None:
    monkeypatch.setattr(log_reading, "_CHUNK_BYTES", chunk)
    text = [f"line {number}" for number in range(20)]
    path = tmp_path / "x.log"
    path.write_text("\n".join(text) + ending)
    found = list(all_lines(log_from_end(path, lines)))
    assert found[len(found) - min(lines, len(found)) :] == text[len(text) - min(lines, 20) :]
    assert len(found) <= lines + 1


def test_where_no_rank_was_started_the_starter_is_quoted(run: RunDirectory) -> None:
    attempt_of(run, 3)
    log = run.logs / "attempt-3" / "agents.log"
    log.write_text("srun: unrecognized option '--nosuch'\nTry \"srun --help\" for more information\n")
    said = str(missing_logs(run, 3, None))
    assert said.endswith(
        f"has a log yet; what starts its hosts has said: srun: unrecognized option '--nosuch' (more in {log})"
    )


@pytest.mark.parametrize(
    ("attempt", "rank", "words"),
    [
        (None, None, "has no logs yet; a run of one process speaks on its terminal alone, and a job writes them once"),
        (7, None, "has no attempt 7; there are: 1, 2"),
        (2, None, "no rank of attempt 2 has a log yet"),
        (1, 9, "rank 9 has no log in attempt 1; there are: 1, 3"),
        (1, 0, r"rank 0 has no log in attempt 1 \(rank 0 of `mega train` speaks on its terminal\); there are: 1, 3"),
    ],
)
def test_what_is_not_there_is_told(run: RunDirectory, attempt: int | None, rank: int | None, words: str) -> None:
    if attempt is not None:
        attempt_of(run, 1, rank_1="", rank_3="")
        attempt_of(run, 2)
        assert logs_of(run, attempt, rank) is None
    with pytest.raises(type(missing_logs(run, attempt, rank)), match=words):
        raise missing_logs(run, attempt, rank)
