"""The head: who is let in, who is not, and what becomes of lines. Agents are played by the tests."""

import asyncio
import resource
from pathlib import Path

import pytest

from launcher.errors import RunError
from launcher.jobs.agents import attempt as attempt_module
from launcher.jobs.agents import head as head_module
from launcher.jobs.agents.handshake import Seal, new_nonce
from launcher.jobs.agents.head import HostLost, RankEnded
from launcher.jobs.agents.protocol import Hello, Lines, Refused, Release, Welcome, encode
from tests.launcher.jobs.fake_agent import TOKEN, FakeAgent, in_time
from tests.launcher.jobs.played_job import Job


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
                agent = await FakeAgent.meet(head)
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


@pytest.mark.parametrize("guess", [None, b"guess"], ids=["without a proof", "with a wrong one"])
def test_who_does_not_know_the_token_is_hung_up_on(job: Job, guess: bytes | None) -> None:
    async def test() -> None:
        async with job.head({"n1": 1}) as (head, attempt):
            agent = await FakeAgent.connect(head)
            agent.writer.write(new_nonce() + b"\n")
            assert TOKEN.encode() not in await agent.reader.readline()
            hello = Hello(attempt=1, host="n1", index=0, agent="x", addresses=("n1",), port=1, sent=1.0)
            seal = (lambda line: line) if guess is None else Seal(own_key=guess, other_key=guess).seal
            agent.writer.write(seal(encode(hello)) + b"\n")
            assert await agent.is_hung_up_on()
            assert attempt.hosts_present == ()

    in_time(test)


def test_an_agent_of_another_attempt_is_refused_and_that_is_said_once(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1}) as (head, attempt):
            for _ in range(2):
                agent = await FakeAgent.meet(head)
                agent.say_hello("n1", attempt=7)
                assert await agent.hear(Refused) == Refused(why="it is of attempt 7, and now is attempt 1")
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
            other = await FakeAgent.meet(head)
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
        b'{"Hello": {"attempt": 1}}\n',
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


def test_agents_are_hung_up_on_when_the_head_ends(job: Job) -> None:
    async def test() -> None:
        async with job.head({"n1": 1}) as (head, _):
            agent = await FakeAgent.come(head, "n1")
            stranger = await FakeAgent.connect(head)
            stranger.writer.write(new_nonce()[:5])
        assert await agent.is_hung_up_on()
        assert await stranger.is_hung_up_on()
        with pytest.raises(OSError):
            await FakeAgent.connect(head)

    in_time(test)
