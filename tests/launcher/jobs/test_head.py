"""The head, and an attempt as it sees it. Agents are played by the tests."""

import asyncio
import contextlib
import resource
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import RunError
from launcher.failure_record import FailureRecord
from launcher.jobs import attempt as attempt_module
from launcher.jobs import head as head_module
from launcher.jobs.head import Attempt, Head, HostLost, RankEnded, RanksPlan
from launcher.jobs.protocol import End, Leaving, Lines, Refused, Release, Signal, Start, Started, Welcome, encode
from tests.launcher.jobs.fake_agent import TOKEN, FakeAgent, in_time


class Job:
    """A head and its attempt, in the folder of the test."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "attempt-1" / "job.log"
        self.said: list[str] = []
        self.shown: list[str] = []

    @contextlib.asynccontextmanager
    async def head(self, expected: Mapping[str, int], silence_s: float = 60.0) -> AsyncIterator[tuple[Head, Attempt]]:
        async with Head(token=TOKEN, silence_s=silence_s, say=self.said.append) as head:
            yield head, head.attempt(1, expected=expected, log=self.log, echo=self.shown.append)

    def plan(self, *hosts: str, ranks_per_host: int = 1, **fields: Any) -> RanksPlan:
        return RanksPlan(
            hosts=hosts,
            ranks_per_host=ranks_per_host,
            command=("train", "it"),
            environ={"A": "b"},
            directory=self.log.parent,
            **fields,
        )

    async def start(
        self, head: Head, attempt: Attempt, *hosts: str, ranks_per_host: int = 1
    ) -> tuple[dict[str, FakeAgent], dict[str, Start]]:
        """One agent on each host, and its ranks."""
        agents = {host: await FakeAgent.come(head, host) for host in hosts}
        assert await attempt.gather(60) == ()
        starting = asyncio.ensure_future(attempt.start_ranks(self.plan(*hosts, ranks_per_host=ranks_per_host)))
        orders = {host: await agent.start() for host, agent in agents.items()}
        await starting
        return agents, orders


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_all_agents_come_and_are_told_the_hosts_name_as_the_job_knows_it(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1, "n2.cluster": 1, "10.0.0.3": 1}, silence_s=7.0) as (head, attempt):
            gathering = asyncio.ensure_future(attempt.gather(60))
            names = {}
            for host, addresses in {"n1.cluster": (), "n2": (), "what": ("10.1.0.3", "10.0.0.3")}.items():
                assert not gathering.done()
                agent = await FakeAgent.connect(head)
                agent.say_hello(host, addresses=addresses)
                names[host] = await agent.hear(Welcome)
            assert await gathering == ()
            assert {host: welcome.host for host, welcome in names.items()} == {
                "n1.cluster": "n1",
                "n2": "n2.cluster",
                "what": "10.0.0.3",
            }
            assert names["n2"].silence_s == 7.0
            assert attempt.hosts_present == ("n1", "n2.cluster", "10.0.0.3")

    in_time(test)


def test_who_has_not_come_in_time_is_named(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 2, "n2": 1, "n3": 2}) as (head, attempt):
            await FakeAgent.come(head, "n1", 0)
            await FakeAgent.come(head, "n3", 0)
            await FakeAgent.come(head, "n3", 1)
            assert await attempt.gather(0.01) == ("n1", "n2")

    in_time(test)


def test_nobody_waits_for_an_agent_that_has_come_and_gone(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_module, "_COME_BACK_S", 0.01)

    async def test() -> None:
        async with job.head({"n1": 1, "n2": 1}) as (head, attempt):
            await FakeAgent.come(head, "n1")
            (await FakeAgent.come(head, "n2")).close()
            while attempt.hosts_present != ("n1",):
                await asyncio.sleep(0)
            assert await attempt.gather(3600) == ("n2",)
            lost = await attempt.next_event()
            assert isinstance(lost, HostLost)
            assert (lost.host, lost.ranks) == ("n2", ())

    in_time(test)


def test_an_agent_that_comes_again_takes_its_own_place(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1}) as (head, attempt):
            first = await FakeAgent.come(head, "n1", agent="x")
            again = await FakeAgent.come(head, "n1", agent="x")
            assert await first.is_hung_up_on()
            starting = asyncio.ensure_future(attempt.start_ranks(job.plan("n1")))
            await again.start()
            await starting
            assert attempt.running() == {0}
            again.end_rank(0)
            assert isinstance(await attempt.next_event(), RankEnded)  # and no loss before

    in_time(test)


def test_who_does_not_know_the_token_is_of_another_job(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1}) as (head, attempt):
            for token in ("guess", "", "gueß"):
                agent = await FakeAgent.connect(head)
                agent.say_hello("n1", token=token)
                assert await agent.hear(Refused) == Refused(why="it belongs to another job", final=False)
                assert await agent.is_hung_up_on()
            assert attempt.hosts_present == ()

    in_time(test)


def test_an_agent_of_another_attempt_is_refused_and_that_is_said_once(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1}) as (head, attempt):
            for _ in range(2):
                agent = await FakeAgent.connect(head)
                agent.say_hello("n1", attempt=7)
                assert await agent.hear(Refused) == Refused(why="it is of attempt 7, and now is attempt 1", final=True)
            assert attempt.hosts_present == ()
            assert job.said == ["an agent on n1 was refused: it is of attempt 7, and now is attempt 1"]

    in_time(test)


def test_a_new_attempt_hangs_up_on_the_agents_of_the_old_one(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1}) as (head, attempt):
            agent = await FakeAgent.come(head, "n1")
            second = head.attempt(2, expected={"n1": 1}, log=job.log)
            assert await agent.is_hung_up_on()
            await FakeAgent.come(head, "n1", attempt=2)
            assert second.hosts_present == ("n1",)
            assert attempt.hosts_present == ()

    in_time(test)


def test_two_agents_cannot_have_the_same_place(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 2}) as (head, attempt):
            await FakeAgent.come(head, "n1", 0, agent="one")
            other = await FakeAgent.connect(head)
            other.say_hello("n1", 0, agent="two")
            why = (await other.hear(Refused)).why
            assert why == "agent 0 of n1 is there already: two processes claim the same place"
            await FakeAgent.come(head, "n1", 1, agent="three")
            assert attempt.hosts_present == ("n1",)

    in_time(test)


def test_agents_that_nobody_asked_for_idle(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1}) as (head, attempt):
            first = await FakeAgent.come(head, "n1", 0)
            more = [await FakeAgent.come(head, "n1", 1), await FakeAgent.come(head, "n9")]
            assert job.said == [
                "an agent has come from n1, more agents than asked for: it gets nothing to do",
                "an agent has come from n9, which is not one of the attempt's hosts: it gets nothing to do",
            ]
            starting = asyncio.ensure_future(attempt.start_ranks(job.plan("n1", ranks_per_host=2)))
            assert (await first.start()).ranks == (0, 1)
            await starting
            more[0].close()  # which is no loss
            releasing = asyncio.ensure_future(attempt.release())
            await more[1].hear(Release)
            await first.hear(Release)
            first.close()
            more[1].close()
            await releasing

    in_time(test)


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"x" * (1 << 17),
        b"[" * 60_000 + b"\n",
        b'{"Release": {}}\n',
        b'{"Hello": {"token": "secret"}}\n',
    ],
)
def test_whoever_does_not_say_hello_is_hung_up_on(job: Job, words: bytes) -> None:
    async def test() -> None:
        async with job.head({"n1": 1}) as (head, attempt):
            stranger = await FakeAgent.connect(head)
            stranger.writer.write(words)
            assert await stranger.is_hung_up_on()
            await FakeAgent.come(head, "n1")
            assert attempt.hosts_present == ("n1",)

    in_time(test)


def test_whoever_says_nothing_is_hung_up_on(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_NAMELESS_S", 0.01)

    async def test() -> None:
        async with job.head({"n1": 1}) as (head, _):
            stranger = await FakeAgent.connect(head)
            assert await stranger.is_hung_up_on()

    in_time(test)


def test_strangers_take_no_more_than_their_share_of_connections(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1}) as (head, _):
            strangers = [await FakeAgent.connect(head) for _ in range(2 * 1 + 64 + 1)]
            assert await strangers[0].is_hung_up_on()
            assert not strangers[-1].reader.at_eof()

    in_time(test)


def test_strangers_keep_no_agent_out(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1, "n2": 1}) as (head, attempt):
            for host in ("n1", "n2"):
                for _ in range(2 * 2 + 64):
                    await FakeAgent.connect(head)
                await FakeAgent.come(head, host)
            assert await attempt.gather(60) == ()

    in_time(test)


def test_a_job_with_more_agents_than_files_is_refused(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))

    async def test() -> None:
        async with job.head({}) as (head, _):
            head.attempt(1, expected={f"n{number}": 4 for number in range(500)}, log=job.log)
            assert limits == [
                (4096, 4096)
            ]  # of these, what 2,000 agents leave is for those who have not said who they are
            head.attempt(1, expected={"n1": 500}, log=job.log)
            assert limits[1:] == [(1820, 4096)]
            message = r"this process may open 4096 files, .* needs 4320: raise its limit \(ulimit -Hn\)"
            with pytest.raises(RunError, match=message):
                head.attempt(2, expected={f"n{number}": 4 for number in range(1000)}, log=job.log)

    in_time(test)


def test_ranks_are_dealt_out_in_blocks_in_the_order_of_hosts(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1, "n2": 1, "n3": 1}) as (head, attempt):
            agents = {host: await FakeAgent.come(head, host) for host in ("n1", "n2", "n3")}
            starting = asyncio.ensure_future(attempt.start_ranks(job.plan("n3", "n1", ranks_per_host=2)))
            orders = {host: await agents[host].hear(Start) for host in ("n3", "n1")}
            agents["n3"].say(Started())
            agents["n1"].say(Started())
            await starting
            assert {host: order.ranks for host, order in orders.items()} == {"n3": (0, 1), "n1": (2, 3)}
            assert orders["n1"] == Start(
                ranks=(2, 3),
                first_local_rank=0,
                ranks_on_host=2,
                num_ranks=4,
                command=("train", "it"),
                environ={"A": "b"},
                directory=str(job.log.parent),
                working_directory=str(Path.cwd()),
                master_address="address-of-n3",
                master_port=29500,
                max_log_bytes=100_000_000,
            )
            assert attempt.running() == {0, 1, 2, 3}
            assert [attempt.host_of(rank) for rank in range(4)] == ["n3", "n3", "n1", "n1"]

    in_time(test)


def test_a_host_with_an_agent_a_rank_deals_them_out_by_the_starters_order(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 3, "n2": 3}) as (head, attempt):
            agents = {
                (host, index): await FakeAgent.come(head, host, index)
                for host, indices in {"n1": (2, 0, 1), "n2": (5, 3, 4)}.items()
                for index in indices
            }
            starting = asyncio.ensure_future(attempt.start_ranks(job.plan("n1", "n2", ranks_per_host=3)))
            orders = {index: await agent.start() for (_, index), agent in agents.items()}
            await starting
            assert {index: order.ranks for index, order in orders.items()} == {n: (n,) for n in range(6)}
            assert {index: order.first_local_rank for index, order in orders.items()} == {n: n % 3 for n in range(6)}

    in_time(test)


@pytest.mark.parametrize(
    ("hosts", "addresses", "meeting_point"),
    [
        (("n1",), ("10.0.0.1",), "127.0.0.1"),
        (("n1", "n2"), ("10.0.0.1", "10.1.0.1"), "10.0.0.1"),
        # Beside the head, as these agents all are.
        (("n1", "n2"), ("127.0.0.1",), "127.0.0.1"),
    ],
)
def test_ranks_meet_where_rank_0_can_be_reached(
    job: Job, hosts: tuple[str, ...], addresses: tuple[str, ...], meeting_point: str
) -> None:
    async def test() -> None:
        async with job.head(dict.fromkeys(hosts, 1)) as (head, attempt):
            agents = [await FakeAgent.come(head, host, addresses=addresses, port=1234) for host in hosts]
            starting = asyncio.ensure_future(attempt.start_ranks(job.plan(*hosts)))
            orders = [await agent.start() for agent in agents]
            await starting
            assert {(order.master_address, order.master_port) for order in orders} == {(meeting_point, 1234)}

    in_time(test)


def test_the_end_of_a_rank_is_told_with_all_that_is_known(job: Job) -> None:
    record = FailureRecord(at=1000.0, message="the disk is full", exit_code=1, traceback="Traceback ...")

    async def test() -> None:
        async with job.head({"n1": 1}) as (head, attempt):
            agents, _ = await job.start(head, attempt, "n1", ranks_per_host=3)
            agents["n1"].end_rank(1, 1, record=vars(record), last_line="OSError", ended_by_us=True)
            agents["n1"].end_rank(0, -9)
            first, second = await attempt.next_event(), await attempt.next_event()
            assert isinstance(first, RankEnded)
            assert isinstance(second, RankEnded)
            assert (first.rank, first.host, first.code, first.last_line, first.ended_by_us) == (
                1,
                "n1",
                1,
                "OSError",
                True,
            )
            assert first.record is not None
            assert (first.record.message, first.record.traceback) == (record.message, record.traceback)
            assert (second.rank, second.code, second.record, second.ended_by_us) == (0, -9, None, False)
            assert attempt.running() == {2}

    in_time(test)


def test_times_are_told_by_the_heads_clock(job: Job) -> None:
    """The agent's clock is an hour late."""

    async def test() -> None:
        async with job.head({"n1": 1}) as (head, attempt):
            late = time.time() - 3600
            agent = await FakeAgent.come(head, "n1", sent=late)
            starting = asyncio.ensure_future(attempt.start_ranks(job.plan("n1")))
            await agent.start()
            await starting
            record = FailureRecord(at=late - 20, message="x", exit_code=1, traceback="")
            agent.end_rank(0, 1, at=late - 10, sent=late, record=vars(record))
            end = await attempt.next_event()
            assert isinstance(end, RankEnded)
            assert end.record is not None
            assert abs(end.at - (time.time() - 10)) < 1000
            assert abs(end.record.at - (end.at - 10)) < 0.01

    in_time(test)


def test_a_closed_connection_is_a_lost_host_at_once(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1, "n2": 1}) as (head, attempt):
            agents, _ = await job.start(head, attempt, "n1", "n2", ranks_per_host=2)
            agents["n2"].end_rank(2)
            await attempt.next_event()
            agents["n2"].close()
            lost = await attempt.next_event()
            assert isinstance(lost, HostLost)
            assert (lost.host, lost.why, lost.ranks) == ("n2", "its agent's connection ended", (3,))
            assert attempt.running() == {0, 1}
            assert attempt.hosts_present == ("n1",)

    in_time(test)


def test_a_silent_host_is_lost(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1}, silence_s=0.1) as (head, attempt):
            await job.start(head, attempt, "n1")
            lost = await attempt.next_event()
            assert isinstance(lost, HostLost)
            assert (lost.host, lost.why, lost.ranks) == ("n1", "nothing heard for 0.1 s", (0,))

    in_time(test)


def test_an_agent_that_leaves_says_why(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1}) as (head, _attempt):
            agents, _ = await job.start(head, _attempt, "n1")
            agents["n1"].say(Leaving(why="its agent was told to end (SIGTERM)"))
            agents["n1"].close()
            lost = await _attempt.next_event()
            assert isinstance(lost, HostLost)
            assert lost.why == "its agent was told to end (SIGTERM)"

    in_time(test)


def test_a_host_that_is_gone_before_the_start_is_told_with_its_ranks(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1, "n2": 1}) as (head, attempt):
            stays, goes = [await FakeAgent.come(head, host) for host in ("n1", "n2")]
            assert await attempt.gather(60) == ()
            goes.close()
            while attempt.hosts_present != ("n1",):
                await asyncio.sleep(0)
            starting = asyncio.ensure_future(attempt.start_ranks(job.plan("n1", "n2", ranks_per_host=2)))
            await stays.start()
            await starting
            spare, lost = await attempt.next_event(), await attempt.next_event()
            assert isinstance(spare, HostLost)
            assert spare.ranks == ()
            assert isinstance(lost, HostLost)
            assert (lost.host, lost.why, lost.ranks) == ("n2", "its agent was gone before the start", (2, 3))
            assert attempt.running() == {0, 1}
            assert attempt.host_of(3) == "n2"

    in_time(test)


def test_an_agent_that_dies_at_the_start_does_not_hold_it_up(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1, "n2": 1}) as (head, attempt):
            agents = [await FakeAgent.come(head, host) for host in ("n1", "n2")]
            starting = asyncio.ensure_future(attempt.start_ranks(job.plan("n1", "n2")))
            await agents[0].start()
            await agents[1].hear(Start)
            agents[1].close()
            await starting
            lost = await attempt.next_event()
            assert isinstance(lost, HostLost)
            assert lost.ranks == (1,)

    in_time(test)


def test_an_agent_that_cannot_start_its_ranks_is_lost(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_module, "_START_S", 0.01)

    async def test() -> None:
        async with job.head({"n1": 1}) as (head, attempt):
            await FakeAgent.come(head, "n1")
            await attempt.start_ranks(job.plan("n1"))
            lost = await attempt.next_event()
            assert isinstance(lost, HostLost)
            assert (lost.why, lost.ranks) == ("its agent could not start ranks within 0.01 s", (0,))

    in_time(test)


def test_a_lost_spare_takes_no_ranks_with_it(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1, "n2": 1}) as (head, attempt):
            spare = await FakeAgent.come(head, "n2")
            agent = await FakeAgent.come(head, "n1")
            starting = asyncio.ensure_future(attempt.start_ranks(job.plan("n1")))
            await agent.start()
            await starting
            spare.close()
            lost = await attempt.next_event()
            assert isinstance(lost, HostLost)
            assert (lost.host, lost.ranks) == ("n2", ())

    in_time(test)


def test_lines_are_folded_into_the_log_of_the_job(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1, "n2": 1}) as (head, attempt):
            agents, _ = await job.start(head, attempt, "n1", "n2", ranks_per_host=2)
            agents["n1"].say(Lines(lines=([0, "step 1"], [1, "rank 1 is ready"], [0, "rank 0 is ready"])))
            agents["n2"].say(Lines(lines=([2, "rank 2 is ready"], [3, "rank 3 is ready"], [3, "last \u6771"])))
            while len(job.shown) < 3:
                await asyncio.sleep(0.01)
            for agent in agents.values():
                agent.close()
            await attempt.release()
        lines = job.log.read_text().splitlines()
        assert sorted(lines) == ["[0-3] rank N is ready", "[0] step 1", "[3] last \u6771"]
        assert job.shown == lines

    in_time(test)


def test_lines_that_still_wait_are_in_the_log_at_the_end(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_FOLD_S", 3600.0)

    async def test() -> None:
        async with job.head({"n1": 1}) as (head, attempt):
            agents, _ = await job.start(head, attempt, "n1", ranks_per_host=2)
            agents["n1"].say(Lines(lines=([1, "last words"],)))
            agents["n1"].end_rank(1, 1)
            await attempt.next_event()
            assert job.shown == []
            agents["n1"].close()
            await attempt.release()
            assert job.shown == ["[1] last words"]
        assert job.log.read_text() == "[1] last words\n"

    in_time(test)


def test_a_terminal_that_is_gone_does_not_end_the_job(job: Job) -> None:
    def show(line: str) -> None:
        job.shown.append(line)
        raise BrokenPipeError

    async def test() -> None:
        async with job.head({}) as (head, _):
            attempt = head.attempt(1, expected={"n1": 1}, log=job.log, echo=show)
            agents, _ = await job.start(head, attempt, "n1")
            agents["n1"].say(Lines(lines=([0, "one"], [0, "two"])))
            agents["n1"].end_rank(0)
            assert isinstance(await attempt.next_event(), RankEnded)
        assert job.log.read_text() == "one\ntwo\n"
        assert job.shown == ["one"]

    in_time(test)


@pytest.mark.parametrize(
    "words",
    [
        Lines(lines=([1, "of a rank of n2"],)),
        Lines(lines=([0],)),
        Lines(lines=("x",)),
        Release(),
    ],
)
def test_an_agent_that_says_what_it_cannot_know_is_lost(job: Job, words: Lines | Release) -> None:
    async def test() -> None:
        async with job.head({"n1": 1, "n2": 1}) as (head, attempt):
            agents, _ = await job.start(head, attempt, "n1", "n2")
            agents["n1"].say(words)
            lost = await attempt.next_event()
            assert isinstance(lost, HostLost)
            assert (lost.host, lost.ranks) == ("n1", (0,))
            assert lost.why.startswith("it does not speak as it should")

    in_time(test)


def test_a_rank_ends_once(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1}) as (head, attempt):
            agents, _ = await job.start(head, attempt, "n1", ranks_per_host=2)
            agents["n1"].end_rank(0)
            agents["n1"].end_rank(0)
            assert isinstance(await attempt.next_event(), RankEnded)
            lost = await attempt.next_event()
            assert isinstance(lost, HostLost)
            assert "rank 0 is none of its running ranks" in lost.why

    in_time(test)


def test_a_signal_goes_to_the_agents_that_run_ranks(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1, "n2": 1}) as (head, attempt):
            agents, _ = await job.start(head, attempt, "n1", "n2")
            agents["n2"].end_rank(1)
            await attempt.next_event()
            attempt.signal(10)
            assert await agents["n1"].hear(Signal) == Signal(number=10)
            attempt.abandon()
            assert await agents["n2"].is_hung_up_on()  # and has heard nothing before

    in_time(test)


def test_ranks_are_asked_to_end_before_they_are_killed(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1, "n2": 1, "n3": 1}) as (head, attempt):
            agents, _ = await job.start(head, attempt, "n1", "n2", "n3")
            ending = asyncio.ensure_future(attempt.end_ranks(0.05))
            for agent in agents.values():
                assert await agent.hear(End) == End(at_once=False)
            agents["n1"].end_rank(0, -15)
            assert await agents["n2"].hear(End) == End(at_once=True)
            assert not ending.done()
            agents["n2"].end_rank(1, -9)
            agents["n3"].close()
            await ending
            assert attempt.running() == frozenset()

    in_time(test)


def test_ranks_that_end_in_time_are_not_killed(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1}) as (head, attempt):
            agents, _ = await job.start(head, attempt, "n1")
            ending = asyncio.ensure_future(attempt.end_ranks(3600))
            await agents["n1"].hear(End)
            agents["n1"].end_rank(0, 75)
            await ending
            await attempt.end_ranks(3600)  # nothing is left to end
            attempt.abandon()
            assert await agents["n1"].is_hung_up_on()

    in_time(test)


def test_a_rank_that_cannot_be_killed_costs_its_host(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_module, "_KILL_S", 0.01)

    async def test() -> None:
        async with job.head({"n1": 1}) as (head, attempt):
            await job.start(head, attempt, "n1")
            await attempt.end_ranks(0.01)
            lost = await attempt.next_event()
            assert isinstance(lost, HostLost)
            assert lost.why == "rank 0 there could not be killed: it hangs in its host's kernel"
            assert lost.ranks == (0,)

    in_time(test)


def test_agents_that_are_sent_home_are_not_lost(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1}) as (head, attempt):
            agents, _ = await job.start(head, attempt, "n1")
            agents["n1"].end_rank(0)
            await attempt.next_event()
            releasing = asyncio.ensure_future(attempt.release())
            await agents["n1"].hear(Release)
            late = await FakeAgent.connect(head)
            late.say_hello("n2")
            assert (await late.hear(Refused)).why == "attempt 1 is over"
            agents["n1"].close()
            await releasing
            event = asyncio.ensure_future(attempt.next_event())
            await asyncio.sleep(0)
            assert not event.done()
            event.cancel()

    in_time(test)


def test_release_does_not_wait_for_ever(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_module, "_RELEASE_S", 0.01)

    async def test() -> None:
        async with job.head({"n1": 1}) as (head, attempt):
            agent = await FakeAgent.come(head, "n1")
            await attempt.release()
            await agent.hear(Release)
            assert await agent.is_hung_up_on()

    in_time(test)


def test_agents_are_hung_up_on_when_the_head_ends(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1}) as (head, _):
            agent = await FakeAgent.come(head, "n1")
            stranger = await FakeAgent.connect(head)
            stranger.writer.write(encode(Release())[:5])
        assert await agent.is_hung_up_on()
        assert await stranger.is_hung_up_on()
        with pytest.raises(OSError):
            await FakeAgent.connect(head)

    in_time(test)
