"""Which host of a job leads: by what the others answer, and for how long they do not."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import RunError
from launcher.jobs.config import LaunchConfig
from launcher.jobs.job import JobEnd
from launcher.jobs.stop_asked import StopAsked
from launcher.jobs.torchrun import node
from launcher.jobs.torchrun.meeting import Meeting
from launcher.jobs.torchrun.node import Node
from launcher.jobs.torchrun.notices import NodeHello, NoNodeError, Notice
from launcher.jobs.torchrun.roster import Roster
from tests.launcher.jobs.fake_agent import in_time

_LAUNCH = LaunchConfig(nodes=2, lost_host_seconds=3.0, start_timeout_seconds=20.0, wait_for_hosts_seconds=20.0)
_HURRIED = LaunchConfig(lost_host_seconds=1.1, start_timeout_seconds=0.2, wait_for_hosts_seconds=0.5)
Answers = dict[str, Notice | str]


class Election:
    """Host n1 of n0, n1, n2; the others answer as told: a notice, or what is wrong with them."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: Answers = {}
        self.asked = 0
        monkeypatch.setattr(node, "connect", self._connect)
        monkeypatch.setattr(node, "_AGAIN_S", 0.01)
        self.directory = directory

    def node(self, launch: LaunchConfig = _LAUNCH, *, place: int | None = 1) -> Node:
        leaders = ("n0", "n1", "n2")
        roster = Roster(leaders=leaders, place=place, name="n1", rank=1, port=1)
        stop = StopAsked(lambda text: None)
        end_file = self.directory / "end"
        found = Node(
            roster,
            launch,
            token="secret",
            run_folder=self.directory,
            end_file=end_file,
            environ={},
            stop=stop,
            lead=self._never,
            say=lambda text: None,
        )
        self.stop = stop
        return found

    async def _never(self, meeting: Meeting, *, goes_on: bool) -> JobEnd:
        raise AssertionError

    async def _connect(
        self, host: str, port: int, hello: NodeHello, *, token: str, timeout_s: float
    ) -> tuple[Any, Notice]:
        self.asked += 1
        answer = self.answers[host]
        if isinstance(answer, str):
            raise NoNodeError(answer)
        return _Nothing(), answer

    @contextlib.asynccontextmanager
    async def searching(self, found: Node) -> AsyncIterator[asyncio.Task[str | None]]:
        """While it looks for a leader, once all hosts have been asked."""
        task = asyncio.create_task(found._find_leader())
        try:
            while self.asked < 4:
                await asyncio.sleep(0.01)
            yield task
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


class _Nothing:
    def close(self) -> None:
        """As a connection."""


@pytest.fixture
def election(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Election:
    return Election(tmp_path, monkeypatch)


def test_who_leads_is_followed_wherever_it_stands(election: Election) -> None:
    async def test() -> None:
        election.answers = {"n0": Notice(host="n0"), "n2": Notice(host="n2", leads=True)}
        assert await election.node()._find_leader() == "n2"

    in_time(test)


def test_the_first_that_is_there_leads_at_once(election: Election) -> None:
    async def test() -> None:
        election.answers = {"n1": Notice(host="n1"), "n2": Notice(host="n2")}
        assert await election.node(place=0)._find_leader() is None

    in_time(test)


def test_a_host_before_it_that_is_there_is_waited_for(election: Election) -> None:
    async def test() -> None:
        election.answers = {"n0": Notice(host="n0"), "n2": Notice(host="n2")}
        launch = LaunchConfig(lost_host_seconds=1.1, start_timeout_seconds=0.2, wait_for_hosts_seconds=60.0)
        async with election.searching(election.node(launch)) as looking:
            assert not looking.done()
            election.answers["n0"] = Notice(host="n0", leads=True)
            assert await looking == "n0"

    in_time(test)


def test_a_host_before_it_that_is_gone_is_waited_for_in_a_new_job_only(election: Election) -> None:
    async def test() -> None:
        patient = LaunchConfig(lost_host_seconds=1.1, start_timeout_seconds=1000.0)
        election.answers = {"n0": "no answer", "n2": Notice(host="n2")}
        async with election.searching(election.node(patient)) as looking:
            assert not looking.done()
            election.answers["n2"] = Notice(host="n2", has_taken_part=True)  # of a job that is under way
            assert await looking is None

    in_time(test)


def test_a_leader_that_fell_silent_has_been_waited_for_already(
    election: Election, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(leader: str, port: int) -> int | None:
        raise NoNodeError("nothing heard", silent_s=1000.0)

    async def test() -> None:
        patient = LaunchConfig(lost_host_seconds=1000.0, start_timeout_seconds=1000.0)
        election.answers = {"n0": "no answer", "n2": Notice(host="n2", has_taken_part=True)}
        follower = election.node(patient)
        monkeypatch.setattr(follower, "_serve", gone)
        assert await follower._follow("n0") is None
        assert await follower._find_leader() is None

    in_time(test)


def test_a_job_that_is_over_is_followed_by_those_only_who_have_taken_part(election: Election) -> None:
    async def test() -> None:
        election.answers = {"n0": Notice(host="n0", leads=True, end=0), "n2": "no answer"}
        async with election.searching(election.node()) as looking:
            assert not looking.done()
        known = election.node()
        known._meeting.tell(has_taken_part=True)
        assert await known._find_leader() == "n0"

    in_time(test)


def test_a_host_that_may_not_lead_and_finds_no_leader_says_where_it_has_looked(election: Election) -> None:
    async def test() -> None:
        election.answers = {"n0": "no answer", "n1": "refused", "n2": "no such host"}
        with pytest.raises(RunError, match=r"no host has led the job for .* \(n0: no answer; n1: refused; n2: no such"):
            await election.node(_HURRIED, place=None)._find_leader()

    in_time(test)


def test_a_stop_signal_ends_the_search(election: Election) -> None:
    async def test() -> None:
        election.answers = {"n0": "no answer", "n2": "no answer"}
        found = election.node()
        async with election.searching(found) as looking:
            election.stop._note(signal.SIGTERM)
            assert await looking is None

    in_time(test)
