"""Real agents: finding the head, losing it, and dying. What a rank does is a few lines of Python."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from launcher.errors import ConfigError, RunError
from launcher.jobs.agents.agent import Agent, AgentPlace, read_place
from launcher.jobs.agents.handshake import Seal, answer
from launcher.jobs.agents.head import Head, HostLost
from launcher.jobs.agents.protocol import (
    HEAD,
    HOST_NAME,
    LONGEST_LINE,
    TOKEN,
    Ended,
    Lines,
    Start,
    Welcome,
    decode,
    encode,
)
from tests.launcher.conftest import Mega
from tests.launcher.jobs.fake_agent import in_time
from tests.launcher.jobs.real_agents import ENTER, Job, ends, is_running, order_of, python, until


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_ranks_die_with_their_agent_and_the_head_knows_at_once(job: Job) -> None:
    async def test() -> None:
        async with job.head("n1", "n2") as attempt:
            await job.start(attempt, python(ENTER + "mark('pid', str(os.getpid()))\nhang()"), ranks_per_host=2)
            await job.wait_for(*(f"pid-{rank}" for rank in range(4)))
            pids = [int((job.here / f"pid-{rank}").read_text()) for rank in range(4)]
            job.agents["n2"].kill()
            lost = await attempt.next_event()
            assert isinstance(lost, HostLost)
            assert (lost.host, lost.why, lost.ranks) == ("n2", "its agent's connection ended", (2, 3))
            await until(lambda: not any(map(is_running, pids[2:])))
            assert all(map(is_running, pids[:2]))

    in_time(test)


def test_a_stopped_agent_is_a_lost_host_and_ends_its_ranks_once_it_goes_on(job: Job) -> None:
    async def test() -> None:
        async with job.head("n1", silence_s=3.0) as attempt:
            await job.start(attempt, python(ENTER + "mark('pid', str(os.getpid()))\nhang()"))
            await job.wait_for("pid-0")
            job.agents["n1"].send_signal(signal.SIGSTOP)
            lost = await attempt.next_event()
            assert isinstance(lost, HostLost)
            assert (lost.why, lost.ranks) == ("nothing heard for 3 s", (0,))
            pid = int((job.here / "pid-0").read_text())
            assert is_running(pid)
            job.agents["n1"].send_signal(signal.SIGCONT)
            code, words = await job.agent_ends("n1")
            assert code == 1
            assert words.startswith("agent on n1: the supervisor of the job is gone (")
            assert not is_running(pid)

    in_time(test)


def test_no_rank_survives_the_head(job: Job) -> None:
    script = (
        ENTER
        + """
if rank == 1:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"])
mark("pids", json.dumps([os.getpid(), child.pid]))
hang()
"""
    )

    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(script), ranks_per_host=2)
            await job.wait_for("pids-0", "pids-1")
            attempt.abandon()
            code, words = await job.agent_ends("n1")
            assert code == 1
            assert words == (
                "agent on n1: the supervisor of the job is gone (its connection ended): the ranks here end\n"
            )
            pids = [pid for rank in (0, 1) for pid in json.loads((job.here / f"pids-{rank}").read_text())]
            await until(lambda: not any(map(is_running, pids)))

    in_time(test)


def test_ranks_outlive_a_head_that_has_no_time(job: Job) -> None:
    """As while its file system hangs: twice the silence after which either end would be lost."""

    async def test() -> None:
        async with job.head("n1", silence_s=3.0) as attempt:
            await job.start(attempt, python(ENTER + "mark('ready')\nwait_for('go')"))
            await job.wait_for("ready-0")
            # The event loop waits too.
            subprocess.run(["sleep", "6"], check=True)
            (job.here / "go").touch()
            assert [end.code for end in await ends(attempt, 1)] == [0]

    in_time(test)


def test_an_agent_without_ranks_ends_when_told_and_says_so(job: Job) -> None:
    async def test() -> None:
        async with job.head("n1") as attempt:
            job.agents["n1"].send_signal(signal.SIGTERM)
            lost = await attempt.next_event()
            assert isinstance(lost, HostLost)
            assert lost.why == "its agent was told to end (SIGTERM)"
            assert await job.agent_ends("n1") == (75, "")

    in_time(test)


def test_ranks_that_still_run_at_the_release_are_killed(job: Job) -> None:
    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python("mark('pid', str(os.getpid()))\nhang()"))
            await job.wait_for("pid-0")
            await attempt.release()
            assert await job.agent_ends("n1") == (0, "")
            assert not is_running(int((job.here / "pid-0").read_text()))

    in_time(test)


async def _hear(reader: asyncio.StreamReader, seal: Seal) -> object:
    while (line := await reader.readline()) == b"{}\n":
        pass
    assert line, "the agent has hung up"
    return decode(seal.open(line[:-1]))


def test_a_head_that_does_not_listen_holds_no_rank_up(job: Job) -> None:
    """It reads nothing until the rank has printed far more than fits on the way, and has ended."""
    script = """
    for number in range(200_000):
        print(f"line {number:9}", "x" * 100)
    print("last line", flush=True)
    mark("printed", str(os.getpid()))
    """
    came: list[list[object]] = []
    found: list[Ended] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        words, seal = answer("secret", (await reader.readline())[:-1])
        writer.write(words + b"\n")
        await _hear(reader, seal)
        for message in (Welcome(host="n1", silence_s=600.0), order_of(job, python(script))):
            writer.write(seal.seal(encode(message)) + b"\n")
        await _hear(reader, seal)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await job.wait_for("printed-0")
        await until(lambda: not Path("/proc", (job.here / "printed-0").read_text()).exists())
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        while not found:
            message = await _hear(reader, seal)
            if isinstance(message, Lines):
                came.extend(message.lines)
            else:
                assert isinstance(message, Ended)
                found.append(message)
        writer.close()

    async def test() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=LONGEST_LINE)
        port = server.sockets[0].getsockname()[1]
        agent = job.start_agent("n1", {HEAD: f"127.0.0.1:{port}", TOKEN: "secret"})
        try:
            await until(lambda: bool(found))
        finally:
            agent.kill()
            agent.communicate(timeout=60)
            server.close()

    in_time(test)
    assert (found[0].code, found[0].last_line) == (0, "last line")
    lines = [str(text) for _, text in came]
    told = [int(line.split()[1].replace(",", "")) for line in lines if line.startswith("(mega: ")]
    assert lines[0].startswith("line         0 ")
    assert told, "some were left out"
    assert len(lines) - len(told) + sum(told) == 200_001
    assert (job.logs / "rank-0.log").read_text().count("\n") == 200_001


def _agent(*addresses: str, port: int, patience_s: float = 0.0) -> Agent:
    place = AgentPlace(addresses=addresses, port=port, token="secret", attempt=1, host="n1", index=0)
    return Agent(place, environ={}, num_cores=1, say=lambda text: None, patience_s=patience_s)


def test_an_agent_that_finds_no_head_says_where_it_looked() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        agent = _agent("127.0.0.1", "127.0.0.2", port=port)
        with pytest.raises(RunError) as caught:
            asyncio.run(agent.run())
    message = str(caught.value)
    assert message.startswith(f"the agent on n1 cannot reach the supervisor of its job at port {port} (127.0.0.1: ")
    assert "; 127.0.0.2: " in message
    assert message.endswith("does the supervisor run, and does a firewall keep the hosts apart?")


def test_an_agent_of_another_attempt_ends_with_the_reason(tmp_path: Path) -> None:
    async def test() -> None:
        async with Head(token="secret", silence_s=60, say=lambda text: None) as head:
            head.attempt(2, expected={"n1": 1}, log=tmp_path / "job.log")
            with pytest.raises(RunError) as caught:
                await _agent("127.0.0.1", port=head.port, patience_s=60).run()
            assert str(caught.value) == (
                "the agent on n1 is refused by its job: it is of attempt 1, and now is attempt 2"
            )

    in_time(test)


@pytest.mark.parametrize("words", [b"220 welcome to another service\r\n", b'{"Started": {}}\n', b""])
def test_strangers_and_other_jobs_at_an_address_are_passed_by(tmp_path: Path, words: bytes) -> None:
    """The head's port may be anybody's on another address that the head believes to be its own."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(words)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()

    async def test() -> None:
        async with Head(token="secret", silence_s=60, say=lambda text: None) as head:
            attempt = head.attempt(1, expected={"n1": 1}, log=tmp_path / "job.log")
            # The head listens on all addresses: here is one that only looks so, on a port of its own.
            stranger = await asyncio.start_server(greet, "127.0.0.1", 0)
            relay = await _relay(stranger.sockets[0].getsockname()[1], head.port)
            agent = asyncio.ensure_future(_agent("127.0.0.2", "127.0.0.3", port=relay[0], patience_s=60).run())
            assert await attempt.gather(60) == ()
            await attempt.release()
            assert await agent == 0
            for server in (stranger, *relay[1]):
                server.close()

    in_time(test)


def test_who_does_not_know_the_token_does_not_hear_it_and_is_not_obeyed(tmp_path: Path) -> None:
    heard = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        heard += await reader.readline()
        words, seal = answer("a guess", heard[:-1])
        order = Start(
            ranks=(0,),
            first_local_rank=0,
            ranks_on_host=1,
            num_ranks=1,
            command=("touch", str(tmp_path / "obeyed")),
            environ={},
            directory=str(tmp_path),
            working_directory=str(tmp_path),
            master_address="127.0.0.1",
            master_port=1,
            max_log_bytes=1000,
        )
        welcome = Welcome(host="n1", silence_s=60.0)
        writer.write(words + b"\n" + b"".join(seal.seal(encode(each)) + b"\n" for each in (welcome, order)))
        heard += await reader.read()

    async def test() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        with pytest.raises(RunError, match="it does not know the token of this job"):
            await _agent("127.0.0.1", port=server.sockets[0].getsockname()[1]).run()
        server.close()

    in_time(test)
    assert heard
    assert b"secret" not in heard
    assert not (tmp_path / "obeyed").exists()


def test_the_head_of_another_job_is_passed_by(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            Head(token="other", silence_s=60, say=lambda text: None) as other,
            Head(token="secret", silence_s=60, say=lambda text: None) as head,
        ):
            attempt = head.attempt(1, expected={"n1": 1}, log=tmp_path / "job.log")
            port, servers = await _relay(other.port, head.port)
            agent = asyncio.ensure_future(_agent("127.0.0.2", "127.0.0.3", port=port, patience_s=60).run())
            assert await attempt.gather(60) == ()
            await attempt.release()
            assert await agent == 0
            for server in servers:
                server.close()

    in_time(test)


async def _relay(first: int, second: int) -> tuple[int, list[asyncio.Server]]:
    """A port at which 127.0.0.2 leads to port `first` of this host, and 127.0.0.3 to `second`."""

    def towards(port: int) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))

        return serve

    one = await asyncio.start_server(towards(first), "127.0.0.2", 0)
    port = one.sockets[0].getsockname()[1]
    return port, [one, await asyncio.start_server(towards(second), "127.0.0.3", port)]


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


_GIVEN = {HEAD: "10.0.0.1,n1:40123", TOKEN: "secret", "MEGA_ATTEMPT": "3"}


@pytest.mark.parametrize(
    ("environ", "host", "index"),
    [
        ({HOST_NAME: "given", "SLURMD_NODENAME": "n7", "SLURM_PROCID": "5"}, "given", 5),
        ({"SLURMD_NODENAME": "n7", "OMPI_COMM_WORLD_RANK": "2", "SLURM_PROCID": "0"}, "n7", 2),
        ({"PMI_RANK": "4"}, socket.gethostname(), 4),
        ({}, socket.gethostname(), 0),
    ],
)
def test_an_agents_place_comes_from_its_starter(environ: dict[str, str], host: str, index: int) -> None:
    assert read_place({**_GIVEN, **environ}) == AgentPlace(
        addresses=("10.0.0.1", "n1"), port=40123, token="secret", attempt=3, host=host, index=index
    )


@pytest.mark.parametrize("change", [{HEAD: "10.0.0.1"}, {"MEGA_ATTEMPT": "x"}, {"SLURM_PROCID": "x"}])
def test_a_place_that_makes_no_sense_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="must be in the environment of an agent"):
        read_place({**_GIVEN, **change})


def test_the_verb_is_not_for_people(mega: Mega, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HEAD, raising=False)
    ended = mega("agent")
    assert ended.code == 2
    assert "MEGA_HEAD, MEGA_JOB_TOKEN and MEGA_ATTEMPT must be in the environment of an agent" in ended.err
    assert " agent " not in mega("--help").out


def test_an_agent_loads_no_command_line_and_says_what_is_wrong() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "launcher", "agent"]
    environ = {name: value for name, value in os.environ.items() if name != HEAD}
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: MEGA_HEAD, MEGA_JOB_TOKEN and MEGA_ATTEMPT must be in the")
    loaded = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "launcher.jobs.agents.agent" in loaded
    assert not {"typer", "pydantic", "rich", "numpy", "torch"} & loaded
