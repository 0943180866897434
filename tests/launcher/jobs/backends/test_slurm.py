"""The hosts of a job of SLURM, its steps and guards, with programs that answer as SLURM's do."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from launcher.errors import ConfigError, RunError
from launcher.jobs.backends import slurm
from launcher.jobs.backends.slurm import SlurmBackend
from launcher.jobs.config import SlurmConfig
from megamodel.train.run_directory import RunDirectory
from tests.launcher.jobs.backends.slurm_case import Case, run, until
from tests.launcher.jobs.fake_slurm import FakeSlurm


def test_it_must_be_within_a_job(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="SLURM_JOB_ID is not set"):
        SlurmBackend({}, SlurmConfig(), RunDirectory(tmp_path), say=print, device="cpu")


@pytest.mark.parametrize(("environ", "is_restart"), [({}, False), ({"SLURM_RESTART_COUNT": "1"}, True)])
def test_whether_slurm_has_started_the_job_before(
    fake_slurm: FakeSlurm, tmp_path: Path, environ: dict[str, str], is_restart: bool
) -> None:
    assert Case(tmp_path, **environ).backend.is_restart is is_restart


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


def test_when_slurm_ends_the_job(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.job(EndTime="2026-11-23T11:01:16")
    assert run(Case(tmp_path).backend.ends_at()) == datetime(2026, 11, 23, 11, 1, 16).timestamp()


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
    guard = 'env > "$FAKE/env.new"; mv "$FAKE/env.new" "$FAKE/env"; exec sleep 1000'
    fake_slurm.program("srun", f'case "$*" in *guard*) {guard};; esac')
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
        await until((fake_slurm.folder / "env").exists)
        environment = (fake_slurm.folder / "env").read_text()
        assert "SLURM_JOB_ID=7\n" in environment
        assert "SLURM_GPU" not in environment
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
