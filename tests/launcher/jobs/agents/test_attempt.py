"""An attempt as the head sees it: the places of ranks, their ends, and lost hosts. Agents are played by the tests."""

import asyncio
import time
from pathlib import Path

import pytest

from launcher.failure_record import FailureRecord
from launcher.jobs.agents import attempt as attempt_module
from launcher.jobs.agents.head import HostLost, RankEnded
from launcher.jobs.agents.protocol import End, Leaving, Lines, Refused, Release, Signal, Start, Started
from tests.launcher.jobs.fake_agent import FakeAgent, in_time
from tests.launcher.jobs.played_job import Job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


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
            assert not lost.silent
            assert attempt.running() == {0, 1}
            assert attempt.hosts_present == ("n1",)

    in_time(test)


def test_a_silent_host_is_lost(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1}, silence_s=1.0) as (head, attempt):
            await job.start(head, attempt, "n1")
            lost = await attempt.next_event()
            assert isinstance(lost, HostLost)
            assert (lost.host, lost.why, lost.ranks) == ("n1", "nothing heard for 1 s", (0,))
            assert lost.silent

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
            assert not lost.silent

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
            late = await FakeAgent.meet(head)
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
