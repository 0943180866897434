"""What a supervisor writes down."""

import asyncio
import json
from pathlib import Path

import pytest

from launcher.jobs import journal as journal_module
from launcher.jobs.job_record import JobFolder, JobState, SupervisorState
from launcher.jobs.journal import Journal
from megamodel.train.run_directory import RunDirectory

_STATE = SupervisorState(state="running", host="n0", pid=7, updated=0.0)


def test_state_and_events_are_written(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)

    async def write() -> None:
        journal = Journal(run, _STATE, say=print)
        await journal.event("attempt", attempt=1)
        await journal.update(state="restarting", attempt=1)
        await journal.update(cause="the disk is full")
        journal.close()

    asyncio.run(write())
    state = JobFolder(run).read_state()
    assert state is not None
    assert (state.state, state.attempt, state.cause) == ("restarting", 1, "the disk is full")
    (event,) = map(json.loads, run.events.read_text().splitlines())
    assert (event["event"], event["attempt"]) == ("attempt", 1)


def test_it_says_again_and_again_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_INTERVAL_SECONDS", 0.01)
    run = RunDirectory(tmp_path)

    async def write() -> None:
        journal = Journal(run, _STATE, say=print)
        alive = asyncio.ensure_future(journal.keep_alive())
        seen: set[float] = set()
        async with asyncio.timeout(30):
            while len(seen) < 3:
                await asyncio.sleep(0.005)
                state = JobFolder(run).read_state()
                seen |= {state.updated} if state else set()
        alive.cancel()
        journal.close()

    asyncio.run(write())


def test_a_disk_that_takes_nothing_is_told_once_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "launch").write_text("a file where a folder should be")
    said: list[str] = []

    async def write() -> None:
        journal = Journal(RunDirectory(tmp_path), _STATE, say=said.append)
        await journal.update(attempt=1)
        await journal.update(attempt=2)
        assert journal.state.attempt == 2
        journal.close()

    asyncio.run(write())
    (line,) = said
    assert line.startswith(f"{tmp_path}: the job's state and events cannot be written now (")
    assert line.endswith("); it goes on")


@pytest.mark.parametrize("state", ["failed", "finished"])
def test_of_a_job_that_has_ended_nothing_more_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: JobState
) -> None:
    monkeypatch.setattr(journal_module, "_INTERVAL_SECONDS", 0.0)
    folder = JobFolder(RunDirectory(tmp_path))

    async def write() -> None:
        journal = Journal(RunDirectory(tmp_path), _STATE, say=print)
        alive = asyncio.ensure_future(journal.keep_alive())
        await journal.update(state=state)
        folder.forget_before_launch()
        async with asyncio.timeout(30):
            await alive
        journal.close()

    asyncio.run(write())
    assert folder.read_state() is None
