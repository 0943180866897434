"""Hosts of a job that nobody starts but the user: who leads, who follows, and what becomes of both."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import textwrap
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from launcher.child_ranks import free_port
from launcher.errors import RunError
from launcher.jobs.agents.handshake import Seal, answer, new_nonce
from launcher.jobs.agents.protocol import ATTEMPT, HEAD, HOST_NAME, TOKEN
from launcher.jobs.backend import AgentsStart
from launcher.jobs.config import LaunchConfig
from launcher.jobs.job import JobEnd
from launcher.jobs.stop_asked import StopAsked
from launcher.jobs.torchrun import host_agent, node
from launcher.jobs.torchrun.backend import TorchrunBackend
from launcher.jobs.torchrun.meeting import Meeting
from launcher.jobs.torchrun.node import Node
from launcher.jobs.torchrun.notices import (
    AgentOrder,
    NodeHello,
    NoNodeError,
    Notice,
    connect,
    encode,
    shared_token,
)
from launcher.jobs.torchrun.roster import Roster
from launcher.run_lock import locked_run
from tests.launcher.jobs.fake_agent import in_time

_LAUNCH = LaunchConfig(nodes=2, lost_host_seconds=3.0, start_timeout_seconds=20.0, wait_for_hosts_seconds=20.0)
_HURRIED = LaunchConfig(lost_host_seconds=1.1, start_timeout_seconds=0.2, wait_for_hosts_seconds=0.5)
# What an agent does here: it says what it was given, and does as `said` tells.
_AGENT = """
import json, os, signal, sys, time
here = os.environ["TEST_DIRECTORY"] + "/" + os.environ["MEGA_HOST_NAME"] + "-" + os.environ["MEGA_ATTEMPT"]
def end(number, frame):
    open(here + "-signal", "w").write(str(number))
    os._exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, end)
with open(here + ".partial", "w") as file:
    json.dump(dict(os.environ), file)
os.rename(here + ".partial", here)
print("an agent", flush=True)
if os.environ["TEST_DOES"] == "waits":
    signal.pause()
sys.exit(int(os.environ["TEST_DOES"]))
"""

Lead = Callable[[Meeting], Awaitable[JobEnd]]


class Hosts:
    """Hosts on this machine, without a hostfile: h0 leads."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.goes_on: list[bool] = []
        self.said: list[str] = []
        self.stops: dict[str, StopAsked] = {}

    def node(
        self, number: int, lead: Lead | None = None, *, token: str = "secret", launch: LaunchConfig = _LAUNCH
    ) -> Node:
        """Host `number`, which leads by `lead` where it does."""
        name = f"h{number}"
        roster = Roster(
            leaders=("127.0.0.1",), place=0 if number == 0 else None, name=name, rank=number, port=self.port
        )
        stop = StopAsked(self.said.append)  # not entered: the test asks
        self.stops[name] = stop

        async def call(meeting: Meeting, *, goes_on: bool) -> JobEnd:
            self.goes_on.append(goes_on)
            assert lead is not None
            return await lead(meeting)

        return Node(
            roster,
            launch,
            token=token,
            run_folder=self.directory / "run",
            end_file=self.directory / "run" / "end",
            environ={**os.environ, "TEST_DIRECTORY": str(self.directory)},
            stop=stop,
            lead=call,
            say=self.said.append,
        )

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        """As if `number` had come to the process of the host."""
        self.stops[name]._note(number)

    def backend(self, meeting: Meeting, *, nodes: int = 2) -> TorchrunBackend:
        """Over the hosts that are there."""
        return TorchrunBackend(
            meeting,
            listed=(),
            nodes=nodes,
            fewest=nodes,
            settle_s=20.0,
            patience_s=20.0,
            goes_on=False,
            stop=self.stops["h0"],
            say=self.said.append,
        )

    def order(self, attempt: int, *hosts: str, does: str) -> AgentsStart:
        """Agents that do `does`: wait, or end with a number."""
        environ = {HEAD: "10.0.0.1:4711", TOKEN: "head", ATTEMPT: str(attempt), "TEST_DOES": does}
        return AgentsStart(hosts=hosts, agents_per_host=1, environ=environ, output=self.directory / "agents.log")

    async def has(self, *names: str) -> None:
        """Waits for files that agents write."""
        while not all((self.directory / name).exists() for name in names):
            await asyncio.sleep(0.01)


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hosts:
    monkeypatch.setattr(host_agent, "AGENT_COMMAND", (sys.executable, "-c", textwrap.dedent(_AGENT)))
    return Hosts(tmp_path)


async def all_ends(*nodes: Node) -> list[int]:
    return await asyncio.gather(*(each.run() for each in nodes))


def test_agents_run_where_the_leader_says_and_the_end_of_the_job_is_everybody_s(hosts: Hosts) -> None:
    async def lead(meeting: Meeting) -> JobEnd:
        backend = hosts.backend(meeting)
        assert await backend.hosts() == ("h0", "h1")
        assert await (await backend.start(hosts.order(1, "h0", "h1", does="0"))).wait() == 0
        agents = await backend.start(hosts.order(2, "h1", does="7"))
        assert await agents.wait() == 7
        await agents.end()
        assert await backend.possible_hosts() == ("h0", "h1")
        return JobEnd(exit_code=3, cause="a check said no")

    async def test() -> None:
        assert await all_ends(hosts.node(0, lead), hosts.node(1)) == [3, 3]
        assert hosts.goes_on == [False]
        assert not (hosts.directory / "h0-2").exists()
        environ = json.loads((hosts.directory / "h1-1").read_text())
        assert environ[HEAD] == "127.0.0.1,10.0.0.1:4711"  # as it has found the leader, before all others
        assert (environ[HOST_NAME], environ["MEGA_SUPERVISOR_PID"]) == ("h1", str(os.getpid()))
        assert (hosts.directory / "agents.log").read_text() == "an agent\n" * 3
        assert "h0 leads the job" in hosts.said
        assert "the job has ended: a check said no" in hosts.said

    in_time(test)


def test_agents_are_asked_to_end_with_their_attempt(hosts: Hosts) -> None:
    async def lead(meeting: Meeting) -> JobEnd:
        backend = hosts.backend(meeting)
        hosts_there = await backend.hosts()
        agents = await backend.start(hosts.order(1, *hosts_there, does="waits"))
        await hosts.has("h0-1", "h1-1")
        await agents.end()
        assert await agents.wait() == 75
        return JobEnd(exit_code=0)

    async def test() -> None:
        assert await all_ends(hosts.node(0, lead), hosts.node(1)) == [0, 0]
        assert (hosts.directory / "h1-1-signal").read_text() == str(int(signal.SIGTERM))

    in_time(test)


def test_a_stop_signal_to_a_host_goes_to_its_ranks_and_the_job_s_end_is_its_own(hosts: Hosts) -> None:
    async def lead(meeting: Meeting) -> JobEnd:
        backend = hosts.backend(meeting)
        hosts_there = await backend.hosts()
        agents = await backend.start(hosts.order(1, *hosts_there, does="waits"))
        await hosts.has("h0-1", "h1-1")
        hosts.stop("h1", signal.SIGUSR1)
        await hosts.has("h1-1-signal")
        await agents.end()
        return JobEnd(exit_code=75)

    async def test() -> None:
        assert await all_ends(hosts.node(0, lead), hosts.node(1)) == [75, 75]
        assert (hosts.directory / "h1-1-signal").read_text() == str(int(signal.SIGUSR1))

    in_time(test)


def test_a_host_that_runs_nothing_stops_alone(hosts: Hosts) -> None:
    stopped = asyncio.Event()

    async def lead(meeting: Meeting) -> JobEnd:
        await hosts.backend(meeting).hosts()
        hosts.stop("h1")
        await meeting.until(lambda: meeting.hosts() == ("h0",))
        stopped.set()
        return JobEnd(exit_code=0)

    async def test() -> None:
        assert await all_ends(hosts.node(0, lead), hosts.node(1)) == [0, 75]
        assert stopped.is_set()

    in_time(test)


def test_a_host_whose_leader_is_lost_ends_its_agent_for_the_next_one(hosts: Hosts) -> None:
    async def first(meeting: Meeting) -> JobEnd:
        backend = hosts.backend(meeting)
        await backend.start(hosts.order(1, *await backend.hosts(), does="waits"))
        await hosts.has("h0-1", "h1-1")
        raise ConnectionError("its machine is gone")

    async def second(meeting: Meeting) -> JobEnd:
        backend = hosts.backend(meeting)
        assert await (await backend.start(hosts.order(2, *await backend.hosts(), does="0"))).wait() == 0
        return JobEnd(exit_code=0)

    async def test() -> None:
        gone = hosts.node(0, first)
        gone._tell_end = lambda code, cause: None  # type: ignore[method-assign]  # it can say no goodbye
        follower = asyncio.create_task(hosts.node(1).run())
        with pytest.raises(ConnectionError):
            await gone.run()
        assert await hosts.node(0, second).run() == 0
        assert await follower == 0
        await hosts.has("h1-1-signal", "h1-2")

    in_time(test)


def test_how_the_job_has_ended_is_found_where_the_leader_is_gone_too_soon(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lead(meeting: Meeting) -> JobEnd:
        await hosts.backend(meeting).hosts()
        return JobEnd(exit_code=1)

    async def test() -> None:
        leader = hosts.node(0, lead)
        leader._meeting.tell = lambda **changes: None if "end" in changes else Meeting.tell(leader._meeting, **changes)  # type: ignore[method-assign]
        monkeypatch.setattr(node, "_GOODBYE_S", 0.1)
        assert await all_ends(leader, hosts.node(1)) == [1, 1]

    in_time(test)


def test_a_run_that_another_process_holds_is_waited_for(hosts: Hosts) -> None:
    async def lead(meeting: Meeting) -> JobEnd:
        return JobEnd(exit_code=0)

    async def test() -> None:
        with locked_run(hosts.directory / "run", say=hosts.said.append):
            leading = asyncio.create_task(hosts.node(0, lead, launch=_HURRIED).run())
            while not hosts.said:
                await asyncio.sleep(0.01)
            assert "waiting: run run is being trained by" in hosts.said[0]
            assert hosts.goes_on == []
        assert await leading == 0

    in_time(test)


def test_a_port_that_is_taken_is_told(hosts: Hosts) -> None:
    async def test() -> None:
        with socket.create_server(("", hosts.port)), pytest.raises(RunError, match=f"port {hosts.port} cannot be"):
            await hosts.node(0).run()

    in_time(test)


def test_hosts_of_another_folder_are_refused_and_say_why(hosts: Hosts) -> None:
    async def lead(meeting: Meeting) -> JobEnd:
        with pytest.raises(RunError, match="do all hosts see the run's folder at the same place"):
            await hosts.node(1, token="another", launch=_HURRIED).run()
        return JobEnd(exit_code=0)

    async def test() -> None:
        assert await hosts.node(0, lead).run() == 0

    in_time(test)


def test_two_processes_that_claim_one_host_are_told(hosts: Hosts) -> None:
    async def lead(meeting: Meeting) -> JobEnd:
        await hosts.backend(meeting).hosts()
        hello = NodeHello(host="h1", rank=1, process="another", only_asks=False)
        with pytest.raises(NoNodeError, match="does `mega launch` run twice on that host"):
            await connect("127.0.0.1", hosts.port, hello, token="secret", timeout_s=20.0)
        return JobEnd(exit_code=0)

    async def test() -> None:
        assert await all_ends(hosts.node(0, lead), hosts.node(1)) == [0, 0]

    in_time(test)


def test_who_listens_without_the_token_does_not_hear_it_and_is_not_followed(hosts: Hosts) -> None:
    heard = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        heard += await reader.readline()
        words, seal = answer("a guess", heard[-33:-1])
        order = AgentOrder(
            key="1", hosts=("h1",), environ={HEAD: "10.0.0.1:4711", ATTEMPT: "1"}, output=str(hosts.directory / "log")
        )
        writer.write(words + b"\n" + seal.seal(encode(Notice(host="h0", leads=True, order=order))) + b"\n")
        heard += await reader.read()

    async def test() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", hosts.port):
            with pytest.raises(RunError, match="it launches another run, or this one in another folder"):
                await hosts.node(1, launch=_HURRIED).run()
        assert heard
        assert b"secret" not in heard
        assert not (hosts.directory / "h1-1").exists()

    in_time(test)


@pytest.mark.parametrize("guess", [None, b"guess"], ids=["without a proof", "with a wrong one"])
def test_who_comes_without_the_token_is_not_heard(hosts: Hosts, guess: bytes | None) -> None:
    async def lead(meeting: Meeting) -> JobEnd:
        reader, writer = await asyncio.open_connection("127.0.0.1", hosts.port)
        writer.write(new_nonce() + b"\n")
        assert b"secret" not in await reader.readline()
        hello = encode(NodeHello(host="h1", rank=1, process="x", only_asks=False))
        writer.write((hello if guess is None else Seal(own_key=guess, other_key=guess).seal(hello)) + b"\n")
        assert await reader.read() == b""
        writer.close()
        assert meeting.hosts() in ((), ("h0",))
        return JobEnd(exit_code=0)

    async def test() -> None:
        assert await hosts.node(0, lead).run() == 0

    in_time(test)


@pytest.mark.parametrize(
    "words", [b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b"[1]\n", b'{"Notice": {}}\n', b"\x00" * 100, b""]
)
def test_strangers_are_hung_up_on(hosts: Hosts, words: bytes) -> None:
    async def lead(meeting: Meeting) -> JobEnd:
        reader, writer = await asyncio.open_connection("127.0.0.1", hosts.port)
        writer.write(words)
        writer.write_eof()
        with contextlib.suppress(ConnectionError):  # more than was read
            assert await reader.read() == b""
        writer.close()
        return JobEnd(exit_code=0)

    async def test() -> None:
        assert await hosts.node(0, lead).run() == 0

    in_time(test)


def test_the_token_is_that_of_the_first_who_comes(tmp_path: Path) -> None:
    token = shared_token(tmp_path / "launch")
    assert shared_token(tmp_path / "launch") == token
    assert shared_token(tmp_path / "another") != token
    assert (tmp_path / "launch" / "token").stat().st_mode & 0o077 == 0
