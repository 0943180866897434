"""Ranks that torchrun starts for an agent: the same promises as for an agent's own, and those about torchrun itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from launcher.jobs.agents.head import HostLost
from launcher.jobs.agents.protocol import ATTEMPT, HOST_NAME
from launcher.jobs.torchrun.host_agent import AGENT_COMMAND
from launcher.jobs.torchrun.order import TorchrunOrder
from launcher.rank_process import SUPERVISOR_PID
from tests.launcher.jobs.agents.test_agent import Job, ends, is_running, python, until
from tests.launcher.jobs.fake_agent import in_time

_ENTER = "rank_process.enter(os.environ)\n"
_WAITS = f"{_ENTER}mark('pid', str(os.getpid()))\nhang()"


class TorchrunJob(Job):
    """A head, and agents whose ranks are torchrun's."""

    def start_agent(self, host: str, environ: dict[str, str]) -> subprocess.Popen[str]:
        own = {ATTEMPT: "1", HOST_NAME: host, SUPERVISOR_PID: str(os.getpid()), "TEST_DIRECTORY": str(self.here)}
        # What an operator of a cluster may set for torchrun must not win over what the job says.
        foreign = {"PET_NPROC_PER_NODE": "7", "PET_RDZV_ENDPOINT": "nowhere:1", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            AGENT_COMMAND, env={**os.environ, **environ, **own, **foreign}, stderr=subprocess.PIPE, text=True
        )

    def torchrun(self, host: str) -> psutil.Process:
        """The process of torchrun below an agent."""
        (process,) = psutil.Process(self.agents[host].pid).children()
        assert "launcher.jobs.torchrun.process" in process.cmdline()
        return process

    def pids(self, number: int) -> list[int]:
        """Of the ranks that have marked theirs."""
        return [int((self.here / f"pid-{rank}").read_text()) for rank in range(number)]


@pytest.fixture
def job(tmp_path: Path) -> TorchrunJob:
    return TorchrunJob(tmp_path)


def test_ranks_are_torchrun_s_and_in_the_order_of_hosts(job: TorchrunJob) -> None:
    script = """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID", "MEGA_HOST_NAME")
    mark("place", json.dumps([os.environ[name] for name in names]))
    mark("parent", str(os.getppid()))
    print("out", rank, flush=True)
    print("err", rank, file=sys.stderr, flush=True)
    wait_for("go")
    """

    async def test() -> None:
        async with job.head("n1", "n2") as attempt:
            await job.start(attempt, python(script), ranks_per_host=2)
            await job.wait_for(*(f"parent-{rank}" for rank in range(4)))
            torchruns = [job.torchrun(host).pid for host in ("n1", "n2")]
            assert [int((job.here / f"parent-{rank}").read_text()) for rank in range(4)] == [
                pid for pid in torchruns for _ in range(2)
            ]
            (job.here / "go").touch()
            assert [end.code for end in await ends(attempt, 4)] == [0, 0, 0, 0]
        places = [json.loads((job.here / f"place-{rank}").read_text()) for rank in range(4)]
        assert places == [
            [str(rank), "4", str(rank % 2), "2", str(rank // 2), "attempt-1", f"n{rank // 2 + 1}"] for rank in range(4)
        ]
        for rank in range(4):
            assert (job.logs / f"rank-{rank}.log").read_text() == f"out {rank}\nerr {rank}\n"

    in_time(test)


def test_every_way_to_end_is_told_and_a_failing_rank_takes_no_other_with_it(job: TorchrunJob) -> None:
    script = f"""
    {_ENTER}
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 2:
        record = {{"at": 1.5, "message": "the disk is full", "exit_code": 4, "traceback": "Traceback"}}
        rank_process.failure_file(os.environ).write_text(json.dumps(record))
        sys.exit(4)
    wait_for("go")
    """

    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(script), ranks_per_host=3)
            killed, failed = await ends(attempt, 2)
            assert (killed.rank, killed.code, killed.record) == (1, -9, None)
            assert (failed.rank, failed.code) == (2, 4)
            assert failed.record is not None
            assert failed.record.message == "the disk is full"
            assert attempt.running() == {0}
            (job.here / "go").touch()
            (last,) = await ends(attempt, 1)
            assert (last.code, last.ended_by_us) == (0, False)

    in_time(test)


def test_stop_signals_reach_ranks_also_those_that_torchrun_has_not_started_yet(job: TorchrunJob) -> None:
    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(_WAITS), ranks_per_host=2)
            attempt.signal(signal.SIGUSR1)  # torch is being imported
            assert [(end.code, end.record) for end in await ends(attempt, 2)] == [(75, None), (75, None)]
            assert not list(job.here.glob("pid-*"))

    in_time(test)


def test_ranks_that_are_ended_are_asked_first_and_killed_then(job: TorchrunJob) -> None:
    script = f"""
    {_ENTER}
    if rank == 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    mark("ready")
    hang()
    """

    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(script), ranks_per_host=2)
            await job.wait_for("ready-0", "ready-1")
            await attempt.end_ranks(5.0)
            asked, killed = await ends(attempt, 2)
            assert (asked.code, asked.ended_by_us) == (75, True)
            assert killed.code != 0
            assert killed.ended_by_us

    in_time(test)


def test_kill_9_of_torchrun_ends_its_ranks_and_says_so(job: TorchrunJob) -> None:
    async def test() -> None:
        async with job.head("n1", "n2") as attempt:
            await job.start(attempt, python(_WAITS), ranks_per_host=2)
            await job.wait_for(*(f"pid-{rank}" for rank in range(4)))
            job.torchrun("n2").kill()
            found = await ends(attempt, 2)
            assert [end.rank for end in found] == [2, 3]
            assert {end.code for end in found} == {1}
            for end in found:
                assert end.record is not None
                assert end.record.message == "torchrun's agent was killed by SIGKILL, and its ranks with it"
            await until(lambda: not any(map(is_running, job.pids(4)[2:])))
            assert all(map(is_running, job.pids(4)[:2]))

    in_time(test)


def test_kill_9_of_the_agent_ends_torchrun_and_its_ranks(job: TorchrunJob) -> None:
    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(_WAITS), ranks_per_host=2)
            await job.wait_for("pid-0", "pid-1")
            pids = [*job.pids(2), job.torchrun("n1").pid]
            job.agents["n1"].kill()
            assert isinstance(await attempt.next_event(), HostLost)
            await until(lambda: not any(map(is_running, pids)))

    in_time(test)


def test_a_torchrun_that_hangs_keeps_no_rank_alive(job: TorchrunJob) -> None:
    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(_WAITS), ranks_per_host=2)
            await job.wait_for("pid-0", "pid-1")
            job.torchrun("n1").suspend()
            await attempt.end_ranks(0.0)
            assert all(end.ended_by_us for end in await ends(attempt, 2))
            await until(lambda: not any(map(is_running, job.pids(2))))

    in_time(test)


def test_nothing_is_left_after_the_release(job: TorchrunJob) -> None:
    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, python(_WAITS))
            await job.wait_for("pid-0")
            pids = [*job.pids(1), job.torchrun("n1").pid]
            await attempt.release()
            assert (await job.agent_ends("n1"))[0] == 0
            await until(lambda: not any(map(is_running, pids)))

    in_time(test)


def test_what_torchrun_itself_fails_of_is_told(job: TorchrunJob) -> None:
    async def test() -> None:
        async with job.head("n1") as attempt:
            await job.start(attempt, ["/nowhere/python"])
            (end,) = await ends(attempt, 1)
            assert end.code == 1
            assert end.record is not None
            assert "torchrun's agent ended with exit code 1: FileNotFoundError" in end.record.message
            assert "torchrun-0.log" in end.record.message

    in_time(test)


def test_an_address_of_ipv6_is_told_to_torchrun_in_brackets() -> None:
    order = TorchrunOrder(
        num_nodes=2,
        node_rank=1,
        ranks_per_node=4,
        address="fd00::7",
        port=4711,
        name="attempt-3",
        command=("python", "-m", "launcher"),
        outputs=(3, 4, 5, 6),
        reports=7,
        directory="logs",
    )
    assert TorchrunOrder.from_text(order.as_text()) == order
    words = order.as_arguments(timeout_s=60)
    assert words[words.index("--rdzv-endpoint") + 1] == "[fd00::7]:4711"
