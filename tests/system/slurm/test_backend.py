"""Steps, hosts and requeues on a real SLURM: what its programs do with what `SlurmBackend` tells them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.jobs.job_record import JobFolder, JobRecord, SupervisorState
from megamodel.train.run_directory import RunDirectory
from tests.system.slurm.cluster import SlurmOfHosts
from tests.system.slurm.configuration import GRACE_SECONDS

pytestmark = pytest.mark.slow

_SECONDS = 60.0
# A supervisor as it could be: it does what is asked for in a file, and answers in another.
_SUPERVISOR = """
import asyncio, dataclasses, json, os, sys, time
from pathlib import Path
from launcher.errors import RunError
from launcher.jobs.backend import AgentsStart
from launcher.jobs.backends.slurm import SlurmBackend
from launcher.jobs.config import SlurmConfig
from launcher.jobs.agents.head import Head
from launcher.jobs.agents.protocol import ATTEMPT
from megamodel.train.run_directory import RunDirectory

root = Path(sys.argv[1])
start = int(os.environ.get("SLURM_RESTART_COUNT", 0))
backend = SlurmBackend(os.environ, SlurmConfig(mpi=sys.argv[2]), RunDirectory(root), say=print, device="cpu")

def answer(number, **what):
    partial = root / "partial"
    partial.write_text(json.dumps(what))
    partial.rename(root / f"answer-{start}-{number}")

async def begin(head, number, hosts, each):
    attempt = head.attempt(number, expected=dict.fromkeys(hosts, each), log=root / f"job-{number}.log")
    environ = {**head.environ, ATTEMPT: str(number)}
    agents = await backend.start(AgentsStart(hosts=hosts, agents_per_host=each, environ=environ, output=root / "agents.log"))
    return agents, attempt, list(await attempt.gather(40.0))

async def until_answered(ask):
    while True:
        try:
            return await ask()
        except RunError as error:  # as where the SIGTERM of a requeue ends the program that has asked for it
            print(error, flush=True)
            await asyncio.sleep(1.0)

async def main():
    async with Head(token="secret", silence_s=600.0, say=print) as head:
        answer(0, hosts=list(await backend.hosts()))
        agents = None
        for number in range(1, 100):
            path = root / f"ask-{start}-{number}"
            while not path.exists():
                await asyncio.sleep(0.02)
            verb, *words = json.loads(path.read_text())
            if verb == "hosts":
                answer(number, hosts=list(await backend.hosts()))
            elif verb == "start":
                agents, attempt, absent = await begin(head, number, *words)
                answer(number, absent=absent)
            elif verb == "end":
                began = time.monotonic()
                await agents.end()
                answer(number, seconds=time.monotonic() - began, code=await agents.wait())
            elif verb == "requeue":
                requeue = lambda: backend.requeue(without=words[0], reason="hosts")
                answer(number, accepted=await until_answered(requeue))
            elif verb == "ends":
                answer(number, ends_in=await until_answered(backend.ends_at) - time.time())
            elif verb == "preempted":
                answer(number, is_preempted=await until_answered(backend.is_preempted))

asyncio.run(main())
"""


class Supervised:
    """A batch job of such a supervisor."""

    def __init__(
        self, slurm: SlurmOfHosts, root: Path, *, hosts: int, tasks: int = 1, mpi: str = "none", lives_on: bool = False
    ) -> None:
        """`lives_on`: after a SIGTERM, as a supervisor does, until SLURM kills it."""
        self.slurm, self.root, self.starts = slurm, root, 0
        self._asked = 0
        first = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if lives_on else ""
        (root / "supervisor.py").write_text(first + _SUPERVISOR)
        self.folder = JobFolder(RunDirectory(root))
        self.folder.root.mkdir()
        # Of a job without a limit SLURM does not always say when its grace time ends.
        options = [
            f"--nodes={hosts}",
            f"--ntasks-per-node={tasks}",
            "--exclusive",
            "--no-kill",
            "--requeue",
            "--time=120",
        ]
        command = (sys.executable, str(root / "supervisor.py"), str(root), mpi)
        self.job = slurm.submit(*command, options=options, env={"OMP_NUM_THREADS": "1"}, cwd=Path.cwd())

    def hear(self) -> dict[str, Any]:
        """The answer to what was asked last; to nothing: the first hosts."""
        path = self.root / f"answer-{self.starts}-{self._asked}"
        wait_until(path.exists, lambda: f"{path.name}\n{self.slurm.output(self.job)}")
        answer: dict[str, Any] = json.loads(path.read_text())
        return answer

    def ask(self, *words: object) -> dict[str, Any]:
        self._asked += 1
        partial = self.root / "asking"
        partial.write_text(json.dumps(words))
        partial.rename(self.root / f"ask-{self.starts}-{self._asked}")
        return self.hear() if words[0] != "requeue" else {}

    def begins_again(self) -> dict[str, Any]:
        self.starts, self._asked = self.starts + 1, 0
        return self.hear()

    def agents(self, host: str) -> int:
        """How many there are."""
        found = 0
        for process in self.slurm.processes(host):
            with suppress(psutil.Error):
                found += process.name() != "srun" and process.cmdline()[-2:] == ["launcher", "agent"]
        return found

    def steps(self) -> set[str]:
        """Names of those that SLURM knows."""
        listing = ("squeue", "--steps", f"--jobs={self.job}", "--noheader", "--format=%j")
        return set(self.slurm.run(*listing).stdout.split())


def wait_until(ready: Callable[[], bool], account: Callable[[], str]) -> None:
    deadline = time.monotonic() + _SECONDS
    while not ready():
        assert time.monotonic() < deadline, account()
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def _left_as_found(slurm: SlurmOfHosts) -> Iterator[None]:
    yield
    for job in slurm.run("squeue", "--noheader", "--format=%i").stdout.split():
        slurm.run("scancel", job, check=False)
    for name in slurm.names:
        slurm.link_up(name)
        if not any(process.name() == "slurmd" for process in slurm.processes(name)):
            slurm.revive_host(name)
        slurm.wait_for_node(name, "IDLE", _SECONDS)


def test_agents_come_and_are_ended(slurm: SlurmOfHosts, tmp_path: Path) -> None:
    job = Supervised(slurm, tmp_path, hosts=4)
    first, second, *others = job.hear()["hosts"]
    assert job.ask("start", [first, *others], 1) == {"absent": []}
    assert {host: job.agents(host) for host in (first, second, *others)} == {
        first: 1,
        second: 0,
        **dict.fromkeys(others, 1),
    }
    job.ask("end")
    wait_until(lambda: not any(map(job.agents, slurm.names)), slurm.logs)
    wait_until(lambda: "attempt-1" not in job.steps(), slurm.logs)
    # On what is left of the job another step begins at once.
    assert job.ask("start", [first, second], 1) == {"absent": []}
    assert job.agents(second) == 1


def test_a_task_a_rank(slurm: SlurmOfHosts, tmp_path: Path) -> None:
    job = Supervised(slurm, tmp_path, hosts=2, tasks=2, mpi="pmix")
    hosts = job.hear()["hosts"]
    assert job.ask("start", hosts, 2) == {"absent": []}
    assert [job.agents(host) for host in hosts] == [2, 2]


def test_a_dead_host_holds_nothing_up(slurm: SlurmOfHosts, tmp_path: Path) -> None:
    job = Supervised(slurm, tmp_path, hosts=4)
    first, second, third, fourth = job.hear()["hosts"]
    job.ask("start", [first, second, third, fourth], 1)
    slurm.kill_host(third)
    # SLURM does not know yet: it waits for an answer of the host whenever it is asked about the step.
    assert job.ask("end")["code"] is not None
    left = [first, second, fourth]
    assert job.ask("start", left, 1) == {"absent": []}
    assert job.agents(fourth) == 1
    slurm.wait_for_node(third, "DOWN", _SECONDS)
    assert job.ask("hosts")["hosts"] == left
    # The step goes on, and so does the job; the host does not come back to it.
    assert job.agents(fourth) == 1
    slurm.revive_host(third)
    slurm.wait_for_node(third, "IDLE", _SECONDS)
    assert job.ask("hosts")["hosts"] == left


def test_hosts_taken_out_of_service_are_left_out(slurm: SlurmOfHosts, tmp_path: Path) -> None:
    job = Supervised(slurm, tmp_path, hosts=4)
    first, second, *others = job.hear()["hosts"]
    slurm.run("scontrol", "update", f"NodeName={second}", "State=DRAIN", "Reason=test")
    try:
        assert job.ask("hosts")["hosts"] == [first, *others]
    finally:
        slurm.run("scontrol", "update", f"NodeName={second}", "State=RESUME")


def test_another_start_of_the_job_is_on_other_hosts(slurm: SlurmOfHosts, tmp_path: Path) -> None:
    job = Supervised(slurm, tmp_path, hosts=3, lives_on=True)
    hosts = job.hear()["hosts"]
    first, _, third = hosts
    job.ask("start", hosts, 1)
    job.folder.write_state(SupervisorState(state="queued", host=first, pid=1, updated=0.0, requeues=1))
    job.ask("requeue", [first, third])
    assert set(job.begins_again()["hosts"]) == {*slurm.names} - {first, third}
    fields = slurm.job(job.job)
    assert (fields["Restarts"], fields["ExcNodeList"]) == ("1", f"{first},{third}")


def test_preemption_is_told_from_a_cancellation(slurm: SlurmOfHosts, tmp_path: Path) -> None:
    job = Supervised(slurm, tmp_path, hosts=4)
    job.hear()
    assert job.ask("preempted") == {"is_preempted": False}
    assert job.ask("ends")["ends_in"] > 3600.0
    slurm.submit("sleep", "1", options=["--partition=high", f"--nodes={len(slurm.names)}", "--exclusive"])
    wait_until(lambda: slurm.job(job.job).get("PreemptTime", "None") != "None", slurm.logs)
    assert job.ask("preempted") == {"is_preempted": True}
    assert job.ask("ends")["ends_in"] <= GRACE_SECONDS


def test_the_loss_of_the_first_host_does_not_leave_a_job_without_a_head(slurm: SlurmOfHosts, tmp_path: Path) -> None:
    job = Supervised(slurm, tmp_path, hosts=3)
    hosts = job.hear()["hosts"]
    job.ask("start", hosts, 1)
    wait_until(lambda: "guard" in job.steps(), slurm.logs)
    slurm.kill_host(hosts[0])
    assert hosts[0] not in job.begins_again()["hosts"]
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert (event["event"], event["reason"], event["host"]) == ("requeue", "host_lost", hosts[0])


def test_a_spare_host_guards_what_trains_on_the_first_alone(slurm: SlurmOfHosts, tmp_path: Path) -> None:
    job = Supervised(slurm, tmp_path, hosts=2)
    first, _ = job.hear()["hosts"]
    job.ask("start", [first], 1)
    wait_until(lambda: "guard" in job.steps(), slurm.logs)
    slurm.kill_host(first)
    assert first not in job.begins_again()["hosts"]


def test_a_job_that_is_being_queued_again_can_be_cancelled(slurm: SlurmOfHosts, tmp_path: Path) -> None:
    """While its processes end it looks like a job that is over."""
    lives_on = ("sh", "-c", 'trap "" TERM; touch up; while sleep 1; do :; done')
    job = slurm.submit(*lives_on, options=["--requeue", "--exclusive"], cwd=tmp_path)
    wait_until((tmp_path / "up").exists, slurm.logs)
    folder = JobFolder(RunDirectory(tmp_path / "run"))
    folder.root.mkdir(parents=True)
    folder.config.touch()
    folder.write_record(
        JobRecord(backend="slurm", job_id=str(job), submitted=time.time(), submitted_from="here", nodes=1)
    )
    folder.write_state(SupervisorState(state="queued", host="h0", pid=1, updated=0.0))
    slurm.run("scontrol", "requeue", str(job))
    seen = slurm.run("squeue", "--noheader", f"--jobs={job}", "--format=%T").stdout
    assert seen == "COMPLETING\n"
    done = slurm.run(sys.executable, "-m", "launcher", "cancel", str(tmp_path / "run"), "--json", cwd=Path.cwd())
    assert json.loads(done.stdout)["action"] == "dequeued"
    assert folder.is_cancelled()
    assert slurm.wait_for(job, ("CANCELLED", "RUNNING"), _SECONDS)["JobState"] == "CANCELLED"


def test_a_cancelled_job_is_not_queued_again(slurm: SlurmOfHosts, tmp_path: Path) -> None:
    job = Supervised(slurm, tmp_path, hosts=2, lives_on=True)
    job.hear()
    slurm.run("scancel", str(job.job))
    slurm.wait_for(job.job, ("COMPLETING",), _SECONDS)
    job.ask("requeue", [])
    assert job.hear() == {"accepted": False}
    fields = slurm.wait_for(job.job, ("CANCELLED", "RUNNING"), _SECONDS)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0")
