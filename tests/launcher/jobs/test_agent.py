"""Agents: real ones, with real ranks. What a rank does is a few lines of Python, or of the shell."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from launcher.errors import ConfigError, RunError
from launcher.jobs.agent import Agent, AgentPlace, read_place
from launcher.jobs.agent_ranks import rank_environ
from launcher.jobs.head import Attempt, Head, HostLost, RankEnded, RanksPlan
from launcher.jobs.ports import FIRST_PORT, NUM_PORTS
from launcher.jobs.protocol import (
    CHOSEN,
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

_AGENT = (sys.executable, "-m", "launcher")
# What a rank begins with. `mark` leaves a file that the test waits for.
_RANK = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from launcher import rank_process
rank, here = int(os.environ["RANK"]), Path(os.environ["TEST_DIRECTORY"])
def mark(name, content=""):
    partial = here / f".{name}-{rank}"
    partial.write_text(content)
    partial.rename(here / f"{name}-{rank}")
def wait_for(name):
    while not (here / name).exists():
        time.sleep(0.01)
def hang():
    while True:
        time.sleep(60)
"""
_ENTER = "rank_process.enter(os.environ)\n"


def python(script: str) -> Sequence[str]:
    """A rank that runs `script`."""
    return (sys.executable, "-c", _RANK + textwrap.dedent(script))


class Job:
    """A head, and real agents on hosts that are names only."""

    def __init__(self, directory: Path) -> None:
        self.here = directory
        self.logs = directory / "attempt-1"
        self.agents: dict[str, subprocess.Popen[str]] = {}
        self.lines: list[str] = []

    @contextlib.asynccontextmanager
    async def head(self, *hosts: str, silence_s: float = 60.0) -> AsyncIterator[Attempt]:
        """All agents have come."""
        async with Head(token="secret", silence_s=silence_s, say=lambda text: None) as head:
            attempt = head.attempt(
                1, expected=dict.fromkeys(hosts, 1), log=self.logs / "job.log", echo=self.lines.append
            )
            try:
                for host in hosts:
                    self.agents[host] = self.start_agent(host, head.environ)
                assert await attempt.gather(60) == ()
                yield attempt
            finally:
                for agent in self.agents.values():
                    agent.kill()
                    agent.wait(60)
                    assert agent.stderr is not None
                    agent.stderr.close()

    def start_agent(self, host: str, environ: dict[str, str]) -> subprocess.Popen[str]:
        environ = {
            **os.environ,
            **environ,
            "MEGA_ATTEMPT": "1",
            HOST_NAME: host,
            "OMP_NUM_THREADS": "",
            "TEST_DIRECTORY": str(self.here),
        }
        return subprocess.Popen([*_AGENT, "agent"], env=environ, stderr=subprocess.PIPE, text=True)

    async def start(self, attempt: Attempt, command: Sequence[str], **fields: object) -> None:
        """Starts a rank on each host, or as many as `fields` say."""
        plan = {"ranks_per_host": 1, "environ": {}, "directory": self.logs, **fields}
        await attempt.start_ranks(RanksPlan(hosts=tuple(self.agents), command=command, **plan))

    async def wait_for(self, *names: str) -> None:
        for name in names:
            await until(lambda name=name: (self.here / name).exists())

    async def agent_ends(self, host: str) -> tuple[int, str]:
        """Exit code and stderr of an agent that ends by itself."""
        agent = self.agents[host]
        _, words = await asyncio.to_thread(agent.communicate, None, 60)
        return agent.returncode, words


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def ends(attempt: Attempt, number: int) -> list[RankEnded]:
    """The next ends of ranks, in the order of ranks."""
    found = [await attempt.next_event() for _ in range(number)]
    assert all(isinstance(end, RankEnded) for end in found), found
    return sorted(found, key=lambda end: end.rank)  # type: ignore[arg-type, return-value, union-attr]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_each_rank_knows_its_place(job: Job) -> None:
    async def test() -> None:
        async with job.head("n1", "n2") as attempt:
            command = python("mark('environ', json.dumps({**os.environ, 'cwd': os.getcwd()}))")
            await job.start(attempt, command, ranks_per_host=2, environ={"OWN": "1"}, working_directory=job.here)
            assert [end.code for end in await ends(attempt, 4)] == [0, 0, 0, 0]
            await attempt.release()
            assert [await job.agent_ends(host) for host in job.agents] == [(0, "")] * 2
        places = [json.loads((job.here / f"environ-{rank}").read_text()) for rank in range(4)]
        for rank, place in enumerate(places):
            assert (place["RANK"], place["WORLD_SIZE"]) == (str(rank), "4")
            assert (place["LOCAL_RANK"], place["LOCAL_WORLD_SIZE"]) == (str(rank % 2), "2")
            assert place["MEGA_HOST_NAME"] == f"n{rank // 2 + 1}"
            assert place["MEGA_ATTEMPT"] == "1"
            assert place["MEGA_FAILURE_FILE"] == str(job.logs / f"rank-{rank}.failure.json")
            assert place["MEGA_SUPERVISOR_PID"] == str(job.agents[place["MEGA_HOST_NAME"]].pid)
            assert (place["OWN"], place["cwd"]) == ("1", str(job.here))
            assert int(place["OMP_NUM_THREADS"]) >= 1
            assert not {HEAD, TOKEN} & place.keys()
        assert len({(place["MASTER_ADDR"], place["MASTER_PORT"]) for place in places}) == 1
        assert FIRST_PORT <= int(places[0]["MASTER_PORT"]) < FIRST_PORT + NUM_PORTS

    in_time(test)


def test_what_ranks_print_comes_before_their_end_and_into_their_logs(job: Job) -> None:
    script = """
    print("one of all", flush=True)
    print(f"mine {rank}", file=sys.stderr, flush=True)
    sys.stdout.write(f"no end of line {rank}")
    """

    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(script), ranks_per_host=2)
            assert [end.last_line for end in await ends(attempt, 2)] == ["no end of line 0", "no end of line 1"]
            await attempt.release()
            assert await job.agent_ends("n1") == (0, "")
        assert sorted(job.lines) == [
            "[0-1] one of all",
            "[0] mine 0",
            "[0] no end of line 0",
            "[1] mine 1",
            "[1] no end of line 1",
        ]
        for rank in (0, 1):
            text = (job.logs / f"rank-{rank}.log").read_text()
            assert text == f"one of all\nmine {rank}\nno end of line {rank}"

    in_time(test)


def test_every_way_to_end_is_told(job: Job) -> None:
    script = """
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 2:
        record = {"at": 1.5, "message": "the disk is full", "exit_code": 4, "traceback": "Traceback"}
        rank_process.failure_file(os.environ).write_text(json.dumps(record))
        sys.exit(4)
    if rank == 3:
        rank_process.failure_file(os.environ).write_text("{")
        sys.exit("the words of its end")
    """

    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(script), ranks_per_host=4)
            found = await ends(attempt, 4)
            assert [end.code for end in found] == [0, -9, 4, 1]
            assert [end.record.message if end.record else None for end in found] == [
                None,
                None,
                "the disk is full",
                None,
            ]
            assert found[3].last_line == "the words of its end"
            assert {end.host for end in found} == {"n1"}
            assert not any(end.ended_by_us for end in found)

    in_time(test)


@pytest.mark.parametrize("command", ["/nowhere/python", "."])
def test_a_command_that_cannot_be_executed_is_the_end_of_its_rank(job: Job, command: str) -> None:
    async def test() -> None:
        async with job.head("n1", "n2") as attempt:
            await job.start(attempt, (command, "x"), working_directory=job.here)
            for end in await ends(attempt, 2):
                assert end.code == 127
                assert end.record is not None
                assert end.record.message.startswith(f"{command} cannot be started in {job.here} ({command}: ")
                assert end.record.message.endswith("): do all hosts see it?")
                assert end.last_line == end.record.message
            await attempt.release()
            assert (await job.agent_ends("n1"))[0] == 0

    in_time(test)


def test_a_folder_that_a_host_does_not_see_is_named(job: Job) -> None:
    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, ("true",), working_directory=Path("/nowhere"))
            (end,) = await ends(attempt, 1)
            assert end.record is not None
            assert end.record.message == (
                "true cannot be started in /nowhere (/nowhere: No such file or directory): do all hosts see it?"
            )

    in_time(test)


def test_what_a_rank_has_started_ends_with_it(job: Job) -> None:
    script = "mark('pid', str(subprocess.Popen(['sleep', '600']).pid))\nos._exit(0)"

    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(script))
            await ends(attempt, 1)
            pid = int((job.here / "pid-0").read_text())
            await until(lambda: not is_running(pid))

    in_time(test)


def test_who_keeps_a_ranks_output_open_does_not_hide_its_end(job: Job) -> None:
    """Such as a process with a session of its own, which nobody ends."""
    script = """
    other = subprocess.Popen(["sleep", "600"], start_new_session=True)
    mark("pid", str(other.pid))
    print("last words", flush=True)
    os._exit(3)
    """

    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(script))
            try:
                (end,) = await ends(attempt, 1)
                assert (end.code, end.last_line) == (3, "last words")
            finally:
                os.kill(int((job.here / "pid-0").read_text()), signal.SIGKILL)

    in_time(test)


_COUNTS_SIGNALS = (
    _ENTER
    + """
arrived = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: (arrived.append(signal.Signals(number).name), mark(arrived[-1])))
mark("ready")
while "SIGUSR2" not in arrived:
    time.sleep(0.01)
mark("arrived", json.dumps(arrived))
sys.exit(75)
"""
)


def test_a_stop_signal_reaches_every_rank_once_however_it_comes(job: Job) -> None:
    async def test() -> None:
        async with job.head("n1", "n2") as attempt:
            await job.start(attempt, python(_COUNTS_SIGNALS), ranks_per_host=2)
            await job.wait_for(*(f"ready-{rank}" for rank in range(4)))
            attempt.signal(signal.SIGTERM)
            attempt.signal(signal.SIGTERM)
            attempt.signal(signal.SIGUSR1)
            attempt.signal(signal.SIGUSR2)
            assert [end.code for end in await ends(attempt, 4)] == [75] * 4
            for rank in range(4):
                arrived = json.loads((job.here / f"arrived-{rank}").read_text())
                assert sorted(arrived) == ["SIGTERM", "SIGUSR1", "SIGUSR2"]

    in_time(test)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stop_signal_to_the_agent_is_one_to_its_ranks(job: Job, number: signal.Signals) -> None:
    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(_COUNTS_SIGNALS))
            await job.wait_for("ready-0")
            job.agents["n1"].send_signal(number)
            await job.wait_for(f"{number.name}-0")
            job.agents["n1"].send_signal(number)
            attempt.signal(signal.SIGUSR2)
            (end,) = await ends(attempt, 1)
            assert (end.code, end.ended_by_us) == (75, False)
            assert sorted(json.loads((job.here / "arrived-0").read_text())) == sorted([number.name, "SIGUSR2"])
            await attempt.release()
            assert (await job.agent_ends("n1"))[0] == 0

    in_time(test)


def test_a_stop_signal_before_a_rank_can_handle_it_is_not_lost(job: Job) -> None:
    script = "mark('born')\nwait_for('go')\nrank_process.enter(os.environ)\nhang()"

    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(script))
            await job.wait_for("born-0")
            attempt.signal(signal.SIGTERM)
            attempt.signal(signal.SIGCONT)
            (job.here / "go").touch()
            assert [end.code for end in await ends(attempt, 1)] == [75]

    in_time(test)


def test_ranks_that_are_ended_are_asked_first_and_killed_then(job: Job) -> None:
    script = (
        _ENTER
        + """
if rank == 1:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
if rank == 2:
    sys.exit(5)
mark("ready")
hang()
"""
    )

    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(script), ranks_per_host=3)
            await job.wait_for("ready-0", "ready-1")
            (first,) = await ends(attempt, 1)
            await attempt.end_ranks(1.0)
            asked, killed = await ends(attempt, 2)
            assert (first.code, first.ended_by_us) == (5, False)
            assert (asked.code, asked.ended_by_us) == (75, True)
            assert (killed.code, killed.ended_by_us) == (-9, True)

    in_time(test)


def test_ranks_die_with_their_agent_and_the_head_knows_at_once(job: Job) -> None:
    async def test() -> None:
        async with job.head("n1", "n2") as attempt:
            await job.start(attempt, python(_ENTER + "mark('pid', str(os.getpid()))\nhang()"), ranks_per_host=2)
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
            await job.start(attempt, python(_ENTER + "mark('pid', str(os.getpid()))\nhang()"))
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
        _ENTER
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
            await job.start(attempt, python(_ENTER + "mark('ready')\nwait_for('go')"))
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


def test_a_full_log_keeps_its_end(job: Job) -> None:
    script = "for number in range(100_000):\n    print('x' * 9)\nprint('the cause')"

    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(script), max_log_bytes=1000)
            (end,) = await ends(attempt, 1)
            assert end.last_line == "the cause"
            await attempt.release()
            assert await job.agent_ends("n1") == (0, "")
        text = (job.logs / "rank-0.log").read_text()
        assert text.startswith("xxxxxxxxx\n" * 100 + "\n(mega: this log is full, 1,000 bytes (launch.max_rank_log_mb)")
        assert text.endswith("xxxxxxxxx\nthe cause\n")
        assert len(text) < 70_000

    in_time(test)


async def _hear(reader: asyncio.StreamReader) -> object:
    message = None
    while message is None:
        line = await reader.readline()
        assert line, "the agent has hung up"
        message = decode(line)
    return message


def _order(job: Job, command: Sequence[str], ranks: tuple[int, ...] = (0,)) -> Start:
    return Start(
        ranks=ranks,
        first_local_rank=0,
        ranks_on_host=len(ranks),
        num_ranks=8,
        command=tuple(command),
        environ={"TEST_DIRECTORY": str(job.here)},
        directory=str(job.logs),
        working_directory=str(job.here),
        master_address="n1",
        master_port=1,
        max_log_bytes=1_000_000_000,
    )


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
        await _hear(reader)
        writer.write(encode(Welcome(host="n1", silence_s=600.0)) + encode(_order(job, python(script))))
        await _hear(reader)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await job.wait_for("printed-0")
        await until(lambda: not Path("/proc", (job.here / "printed-0").read_text()).exists())
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        while not found:
            message = await _hear(reader)
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
    assert "launcher.jobs.agent" in loaded
    assert not {"typer", "pydantic", "rich", "numpy", "torch"} & loaded


def test_ranks_do_not_claim_their_agents_place_in_mpi(job: Job) -> None:
    mpi = {"PMIX_RANK": "1", "OMPI_COMM_WORLD_RANK": "1", "PMI_RANK": "1", "OMPI_MCA_btl": "tcp", "SLURM_PROCID": "1"}
    several = rank_environ(mpi, _order(job, ("x",), (0, 1)), host="n1", num_cores=2)
    assert {name for name in mpi if name in several} == {"OMPI_MCA_btl", "SLURM_PROCID"}
    assert mpi.keys() <= rank_environ(mpi, _order(job, ("x",), (0,)), host="n1", num_cores=2).keys()


def test_ranks_share_the_cores_unless_the_user_says_otherwise(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)

    def threads(ranks: tuple[int, ...], ranks_on_host: int, num_cores: int, **environ: str) -> str:
        order = _order(job, ("x",), ranks)
        order = Start(**{**vars(order), "ranks_on_host": ranks_on_host})
        return rank_environ(environ, order, host="n1", num_cores=num_cores)["OMP_NUM_THREADS"]

    assert threads((0, 1, 2, 3), 4, 16) == "4"
    assert threads((0,), 4, 16) == "4"  # one agent a rank, all on the same cores
    assert threads((0,), 4, 4) == "4"  # one agent a rank, each on cores of its own
    assert threads((0, 1, 2, 3), 4, 2) == "1"
    assert threads((0, 1), 2, 16, OMP_NUM_THREADS="3") == "3"


def test_a_rank_knows_whether_its_host_or_the_user_has_set_its_threads(job: Job) -> None:
    order = _order(job, ("x",))
    assert rank_environ({"OMP_NUM_THREADS": ""}, order, host="n1", num_cores=2)[CHOSEN] == "OMP_NUM_THREADS"
    inherited = {"OMP_NUM_THREADS": "3", CHOSEN: "OMP_NUM_THREADS"}
    assert CHOSEN not in rank_environ(inherited, order, host="n1", num_cores=2)
