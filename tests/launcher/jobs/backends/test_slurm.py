"""The hosts of a job of SLURM, with programs that answer as SLURM's do."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from launcher.errors import ConfigError, RunError
from launcher.jobs.backend import AgentsStart
from launcher.jobs.backends import slurm
from launcher.jobs.backends.slurm import SlurmBackend
from launcher.jobs.config import SlurmConfig
from launcher.jobs.job_record import JobFolder, SupervisorState
from megamodel.train.run_directory import RunDirectory
from tests.launcher.jobs.fake_slurm import FakeSlurm

T = TypeVar("T")


def run(work: Awaitable[T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(work, 60)

    return asyncio.run(bounded())


class Case:
    """A backend within job 7, in its second start if `restarts` is 1."""

    def __init__(self, folder: Path, config: SlurmConfig | None = None, **environ: str) -> None:
        self.run = RunDirectory(folder / "runs" / "big")
        self.folder = JobFolder(self.run)
        self.folder.root.mkdir(parents=True)
        self.said: list[str] = []
        environ = {**os.environ, "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", **environ}
        self.backend = SlurmBackend(
            environ, config or SlurmConfig(), self.run, say=self.said.append, device="cpu", working_directory=folder
        )

    def has_requeued(self, times: int) -> None:
        """As the supervisor counts, which does so before it asks."""
        state = SupervisorState(state="queued", host="n1", pid=1, updated=0.0)
        self.folder.write_state(replace(state, requeues=times))

    def start(self, hosts: tuple[str, ...] = ("n2", "n3"), agents_per_host: int = 1) -> AgentsStart:
        environ = {"MEGA_ATTEMPT": "4", "MEGA_JOB_TOKEN": "secret"}
        output = self.folder.root / "agents.log"
        return AgentsStart(hosts=hosts, agents_per_host=agents_per_host, environ=environ, output=output)


async def until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_it_must_be_within_a_job(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="SLURM_JOB_ID is not set"):
        SlurmBackend({}, SlurmConfig(), RunDirectory(tmp_path), say=print, device="cpu")


def test_hosts_are_those_that_the_job_still_has(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    case = Case(tmp_path, SLURM_JOB_NODELIST="n[1-4]")
    fake_slurm.job(NodeList="n[1,3-4]")
    fake_slurm.program("sinfo", r'printf "n1|mixed\nn3|down*\nn4|allocated\n"')
    assert run(case.backend.hosts()) == ("n1", "n4")
    fake_slurm.program("scontrol", "echo Unable to contact slurm controller >&2; exit 1")
    with pytest.raises(RunError, match="Unable to contact"):
        run(case.backend.hosts())


def test_a_host_that_has_left_the_job_does_not_come_back(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    case = Case(tmp_path, SLURM_JOB_NODELIST="n[1-4]")
    fake_slurm.job(NodeList="n[1,3-4]")
    fake_slurm.program("sinfo", r'printf "n1|mixed\nn3|down*\nn4|allocated\n"')
    assert run(case.backend.possible_hosts()) == ("n1", "n3", "n4")
    fake_slurm.program("scontrol", "exit 1")
    with pytest.raises(RunError, match="job 7"):
        run(case.backend.possible_hosts())


def test_a_step_has_agents_on_the_hosts_and_their_environment(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    case = Case(tmp_path, SlurmConfig(mpi="pmix"), SLURM_NTASKS="2")
    assert case.backend.task_per_rank
    fake_slurm.program(
        "srun",
        'env | grep -E "^(MEGA|SLURM)_" | sort > "$FAKE/env"; echo words; echo more >&2; exit 5',
    )

    async def work() -> int:
        agents = await case.backend.start(case.start(agents_per_host=4))
        code = await agents.wait()
        await agents.end()
        await agents.end()
        return code

    assert run(work()) == 5
    (step,) = fake_slurm.calls("srun")
    assert "--nodes=2 --nodelist=n[2-3] --ntasks=8 --ntasks-per-node=4" in step
    assert "--job-name=attempt-4 " in step
    assert step.endswith("-m launcher agent")
    assert "secret" not in step
    seen = (fake_slurm.folder / "env").read_text().splitlines()
    assert "MEGA_JOB_TOKEN=secret" in seen
    assert f"MEGA_RUN={case.run.root}" in seen
    assert "SLURM_NTASKS=2" not in seen
    assert (case.folder.root / "agents.log").read_text() == "words\nmore\n"


def test_no_srun(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    case = Case(tmp_path, PATH=str(tmp_path))
    with pytest.raises(RunError, match="srun cannot be started: No such file"):
        run(case.backend.start(case.start()))


def test_a_step_is_asked_to_end(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    case = Case(tmp_path)
    fake_slurm.program(
        "srun",
        'case "$*" in *guard*) exit 0;; esac; touch "$FAKE/up"; while [ ! -e "$FAKE/told" ]; do sleep 0.02; done',
    )
    fake_slurm.program("squeue", r'printf "7.batch|batch\n7.3|attempt-3\n7.5|attempt-4\n"')
    fake_slurm.program("scancel", 'touch "$FAKE/told"')

    async def work() -> int:
        agents = await case.backend.start(case.start())
        await until((fake_slurm.folder / "up").exists)
        await agents.end()
        return await agents.wait()

    assert run(work()) == 0
    assert fake_slurm.calls("squeue") == ["squeue --steps --jobs=7 --noheader --format=%i|%j"]
    assert fake_slurm.calls("scancel") == ["scancel --signal=TERM 7.5"]


def test_a_step_that_stays_is_killed_even_where_slurm_is_silent(
    fake_slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_ASK_SECONDS", 0.5)
    monkeypatch.setattr(slurm, "_KILL_SECONDS", 0.5)
    case = Case(tmp_path)
    fake_slurm.program("srun", 'case "$*" in *guard*) exit 0;; esac; trap "" TERM; touch "$FAKE/up"; exec sleep 1000')
    fake_slurm.program("squeue", 'echo "7.5|attempt-4"')
    fake_slurm.program("scancel", "exec sleep 1000")

    async def work() -> int:
        agents = await case.backend.start(case.start())
        await until((fake_slurm.folder / "up").exists)
        await agents.end()
        return await agents.wait()

    assert run(work()) == -9
    assert sorted(fake_slurm.calls("scancel"), reverse=True) == [
        "scancel --signal=TERM 7.5",
        "scancel --signal=KILL 7.5",
    ]


@pytest.fixture
def guarded(fake_slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    """Whose guards stay until they are ended."""
    monkeypatch.setattr(slurm, "_GUARD_SECONDS", 0.02)
    fake_slurm.program("sinfo", r'printf "n1|mixed\nn2|mixed\nn3|mixed\nn4|mixed\n"')
    fake_slurm.program("srun", 'case "$*" in *guard*) env > "$FAKE/env"; exec sleep 1000;; esac')
    fake_slurm.job()
    case = Case(tmp_path, SLURM_GPUS_PER_NODE="8")
    yield case
    guard = case.backend._guard
    if guard is not None:
        guard.kill()
        guard.wait(timeout=30)


def guards(fake_slurm: FakeSlurm) -> list[str]:
    return [call for call in fake_slurm.calls("srun") if "slurm.guard" in call]


async def start_on(case: Case, *hosts: str) -> None:
    agents = await case.backend.start(case.start(hosts))
    await agents.wait()


def test_guards_are_on_other_hosts_and_no_more_than_two(fake_slurm: FakeSlurm, guarded: Case) -> None:
    async def work() -> None:
        await start_on(guarded, "n1", "n2", "n3", "n4")
        await until(lambda: len(guards(fake_slurm)) == 1)
        assert "--nodes=2 --nodelist=n[3-4] --ntasks=2" in guards(fake_slurm)[0]
        assert "--gres=none" in guards(fake_slurm)[0]
        assert guards(fake_slurm)[0].endswith(f"launcher.jobs.slurm.guard {guarded.run.root} 50")
        await until(lambda: "SLURM_JOB_ID=7\n" in (fake_slurm.folder / "env").read_text())
        assert "SLURM_GPU" not in (fake_slurm.folder / "env").read_text()
        looks = len(fake_slurm.calls("sinfo"))
        await start_on(guarded, "n1", "n2", "n3", "n4")
        await until(lambda: len(fake_slurm.calls("sinfo")) > looks)
        fake_slurm.job(NodeList="n[1-3]")
        await start_on(guarded, "n1", "n2", "n3")
        await until(lambda: len(guards(fake_slurm)) == 2)
        assert "--nodelist=n[2-3]" in guards(fake_slurm)[1]

    run(work())


def test_hosts_that_do_not_train_guard_too(fake_slurm: FakeSlurm, guarded: Case) -> None:
    async def work() -> None:
        await start_on(guarded, "n1")
        await until(lambda: len(guards(fake_slurm)) == 1)
        assert "--nodelist=n[3-4]" in guards(fake_slurm)[0]

    run(work())


def test_a_job_of_one_host_has_no_guard(fake_slurm: FakeSlurm, guarded: Case) -> None:
    async def work() -> None:
        fake_slurm.job(NodeList="n1")
        await start_on(guarded, "n1")
        keeping = guarded.backend._keeping_guard
        assert keeping is not None
        await keeping

    run(work())
    assert guards(fake_slurm) == []


def test_a_guard_that_dies_is_replaced_within_the_attempt(fake_slurm: FakeSlurm, guarded: Case) -> None:
    async def work() -> None:
        fake_slurm.program("sinfo", "echo Unable to contact slurm controller >&2; exit 1")
        await start_on(guarded, "n1", "n2")
        await until(lambda: bool(guarded.said))
        assert "nobody guards this job against the loss of n1 now: sinfo: Unable to contact" in guarded.said[0]
        fake_slurm.program("sinfo", r'printf "n1|mixed\nn2|mixed\n"')
        await until(lambda: len(guards(fake_slurm)) == 1)
        guard = guarded.backend._guard
        assert guard is not None
        guard.kill()
        await until(lambda: len(guards(fake_slurm)) == 2)
        assert "--nodelist=n2 " in guards(fake_slurm)[1]

    run(work())


def test_another_start_on_other_hosts(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    case = Case(tmp_path, SlurmConfig(exclude="n[8-9]"))
    fake_slurm.job()
    case.has_requeued(1)
    assert run(case.backend.requeue(without=("n2", "n3"), reason="hosts"))
    # The list of a running job cannot be changed, so this order.
    assert fake_slurm.calls()[1:] == ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n[8-9],n2,n3"]


def test_the_signal_of_a_requeue_keeps_no_bad_host_in_the_job(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    """It ends the very program that is just to keep them out."""
    case = Case(tmp_path)
    fake_slurm.job()
    fake_slurm.program(
        "scontrol",
        '[ "$1" = update ] && [ ! -e "$FAKE/told" ] && { touch "$FAKE/told"; kill -TERM $$; }; cat "$FAKE/job"',
    )
    assert run(case.backend.requeue(without=("n2",), reason="hosts"))
    assert fake_slurm.calls()[2:] == ["scontrol update JobId=7 ExcNodeList=n2"] * 2
    assert case.said == []


def test_another_start_on_the_same_hosts(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    case = Case(tmp_path)
    fake_slurm.job()
    assert run(case.backend.requeue(without=(), reason="time_limit"))
    assert fake_slurm.calls()[1:] == ["scontrol requeue 7"]


def test_slurm_has_queued_the_job_again_already(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    case = Case(tmp_path, SlurmConfig(requeue=False), SLURM_RESTART_COUNT="2")
    fake_slurm.job(JobState="COMPLETING", Restarts="3")
    assert run(case.backend.is_preempted())
    assert run(case.backend.requeue(without=("n2",), reason="preemption"))
    assert fake_slurm.calls()[-1] == "scontrol update JobId=7 ExcNodeList=n2"
    assert not any("requeue" in call for call in fake_slurm.calls())


@pytest.mark.parametrize("job_state", ["COMPLETING", "CANCELLED"])
def test_a_job_that_somebody_cancels_does_not_come_back(fake_slurm: FakeSlurm, tmp_path: Path, job_state: str) -> None:
    case = Case(tmp_path)
    fake_slurm.job(JobState=job_state)
    assert not run(case.backend.requeue(without=("n2",), reason="preemption"))
    assert fake_slurm.calls() == ["scontrol --oneliner show job 7"]
    assert case.said == ["job 7 is being cancelled, so it is not queued again"]


def test_a_job_whose_time_is_over_does(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    case = Case(tmp_path)
    fake_slurm.job(JobState="COMPLETING", Reason="TimeLimit")
    assert run(case.backend.requeue(without=(), reason="time_limit"))
    assert fake_slurm.calls()[-1] == "scontrol requeue 7"


_SILENT_AT_FIRST = """
[ "$1" = {verb} ] && [ "$(grep -c "^scontrol {verb}" "$FAKE/calls")" -lt 3 ] && {{
    echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1
}}
[ "$1" = requeue ] || cat "$FAKE/job"
"""


@pytest.mark.parametrize("verb", ["--oneliner", "requeue"])
def test_a_controller_that_is_silent_at_first_is_asked_again(
    fake_slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr(slurm, "_ASK_AGAIN_SECONDS", 0.0)
    fake_slurm.job(PreemptTime="2026-11-23T11:01:12")
    fake_slurm.program("scontrol", _SILENT_AT_FIRST.format(verb=verb))
    case = Case(tmp_path)
    if verb == "--oneliner":
        assert run(case.backend.is_preempted())
        fake_slurm.forget_calls()
    assert run(case.backend.requeue(without=(), reason="preemption"))
    assert fake_slurm.calls()[-1] == "scontrol requeue 7"
    assert all(said.endswith("Unable to contact slurm controller; asking again") for said in case.said)
    assert len(case.said) == (4 if verb == "--oneliner" else 2)


def test_slurm_has_taken_what_it_did_not_confirm(
    fake_slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_ASK_AGAIN_SECONDS", 0.0)
    fake_slurm.job()
    fake_slurm.program(
        "scontrol",
        'cat "$FAKE/job"; [ "$1" = requeue ] && { sed -i s/Restarts=0/Restarts=1/ "$FAKE/job"; exit 1; }; exit 0',
    )
    case = Case(tmp_path)
    assert run(case.backend.requeue(without=(), reason="preemption"))
    assert fake_slurm.calls() == [
        "scontrol --oneliner show job 7",
        "scontrol requeue 7",
        "scontrol --oneliner show job 7",
    ]


@pytest.mark.parametrize(
    ("config", "requeues", "restarts", "may"),
    [
        (SlurmConfig(requeue=False), 1, 0, False),
        (SlurmConfig(max_requeues=3), 3, 0, True),
        (SlurmConfig(max_requeues=3), 4, 0, False),
        (SlurmConfig(max_requeues=3), 1, 3, False),
        (SlurmConfig(max_requeues=0), 1, 0, False),
    ],
)
def test_requeues_are_counted(
    fake_slurm: FakeSlurm, tmp_path: Path, config: SlurmConfig, requeues: int, restarts: int, may: bool
) -> None:
    case = Case(tmp_path, config, SLURM_RESTART_COUNT=str(restarts))
    fake_slurm.job(Restarts=str(restarts))
    case.has_requeued(requeues)
    assert run(case.backend.requeue(without=(), reason="hosts")) is may
    assert any("requeue" in call for call in fake_slurm.calls()) is may
    if not may and config.requeue:
        assert f"slurm.max_requeues = {config.max_requeues}" in case.said[0]


def test_slurm_says_no(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    case = Case(tmp_path)
    fake_slurm.job()
    fake_slurm.program("scontrol", '[ "$1" = requeue ] && { echo "Access denied" >&2; exit 1; }; cat "$FAKE/job"')
    with pytest.raises(RunError, match="scontrol requeue 7: Access denied"):
        run(case.backend.requeue(without=(), reason="hosts"))


def test_hosts_that_slurm_may_give_again_are_told(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    case = Case(tmp_path)
    fake_slurm.job()
    fake_slurm.program("scontrol", '[ "$1" = update ] && { echo "Access denied" >&2; exit 1; }; cat "$FAKE/job"')
    assert run(case.backend.requeue(without=("n2",), reason="hosts"))
    assert case.said == ["SLURM may give the job n2 again: Access denied"]


@pytest.mark.parametrize(
    ("changes", "is_preempted"),
    [
        ({}, False),
        ({"PreemptTime": "2026-11-23T11:01:12"}, True),
        ({"JobState": "COMPLETING", "Restarts": "1"}, True),
        ({"JobState": "COMPLETING", "Reason": "TimeLimit"}, True),
        # scancel: a job that comes back then would anger its user.
        ({"JobState": "COMPLETING"}, False),
    ],
)
def test_who_wants_the_hosts_back(
    fake_slurm: FakeSlurm, tmp_path: Path, changes: dict[str, str], is_preempted: bool
) -> None:
    fake_slurm.job(**changes)
    assert run(Case(tmp_path).backend.is_preempted()) is is_preempted


def test_a_silent_controller_preempts_nobody(
    fake_slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_PATIENCE_SECONDS", 0.0)
    fake_slurm.program("scontrol", "exit 1")
    case = Case(tmp_path)
    assert not run(case.backend.is_preempted())
    assert "not known" in case.said[0]
