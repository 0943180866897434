"""The command line of a step."""

from __future__ import annotations

import sys
from pathlib import Path

from launcher.jobs.config import ContainerConfig, SlurmConfig
from launcher.jobs.slurm.step import step_command, step_environ


def command_of(slurm: SlurmConfig, *, tasks_per_host: int = 1, device: str = "auto") -> tuple[str, ...]:
    return step_command(
        slurm,
        hosts=["n1", "n2", "n4"],
        tasks_per_host=tasks_per_host,
        name="attempt-2",
        working_directory=Path("/work"),
        run_directory=Path("runs/big"),
        job_id="7",
        device=device,
    )


def test_one_agent_a_host() -> None:
    command = command_of(SlurmConfig(srun_options=("--nice=5",)))
    assert command[0] == "srun"
    assert command[-5:] == ("--nice=5", sys.executable, "-m", "launcher", "agent")
    assert {"--nodes=3", "--nodelist=n[1-2,4]", "--ntasks=3", "--ntasks-per-node=1", "--job-name=attempt-2"} <= {
        *command
    }
    # One dead rank must not have the others killed before they have said what they saw.
    assert {"--kill-on-bad-exit=0", "--wait=0", "--no-kill", "--overlap", "--mpi=none", "--cpu-bind=none"} <= {*command}


def test_a_task_a_rank_under_pmix() -> None:
    command = command_of(SlurmConfig(mpi="pmix"), tasks_per_host=4)
    assert {"--ntasks=12", "--ntasks-per-node=4", "--mpi=pmix", "--distribution=block"} <= {*command}


def test_pyxis() -> None:
    container = ContainerConfig(
        runtime="pyxis", image="nvcr.io#nvidia/pytorch:25.01", mounts=("/data", "/a:/b:ro"), python="py"
    )
    command = command_of(SlurmConfig(container=container))
    assert command[-8:] == (
        "--container-image=nvcr.io#nvidia/pytorch:25.01",
        "--container-name=mega-7",
        "--container-mounts=/work:/work,/work/runs/big:/work/runs/big,/data:/data,/a:/b:ro",
        "--container-workdir=/work",
        "py",
        "-m",
        "launcher",
        "agent",
    )


def test_an_image_in_a_file_is_not_kept_on_hosts() -> None:
    container = ContainerConfig(runtime="pyxis", image="/images/x.sqsh")
    assert not any(word.startswith("--container-name") for word in command_of(SlurmConfig(container=container)))


def test_apptainer() -> None:
    container = ContainerConfig(runtime="apptainer", image="/images/x.sif", mounts=("/data",))
    inside = ("--pwd", "/work", "/images/x.sif", "python3", "-m", "launcher", "agent")
    mounts = ("--bind", "/work:/work,/work/runs/big:/work/runs/big,/data:/data")
    slurm = SlurmConfig(container=container)
    assert command_of(slurm, device="cpu")[-11:] == ("apptainer", "exec", *mounts, *inside)
    # GPUs may be asked for in other ways than slurm.gpus.
    for device in ("auto", "cuda"):
        assert command_of(slurm, device=device)[-12:] == ("apptainer", "exec", "--nv", *mounts, *inside)


def test_what_the_job_was_asked_for_is_not_what_a_step_is_asked_for() -> None:
    given = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "8",
        "SLURM_CPUS_PER_TASK": "12",
        "SLURM_GPUS_PER_TASK": "1",
        "SLURM_NTASKS_PER_GPU": "1",
        "SLURM_NTASKS_PER_SOCKET": "4",
        "SLURM_NTASKS_PER_CORE": "1",
        "SLURM_THREADS_PER_CORE": "1",
        "SLURM_HINT": "nomultithread",
        "SLURM_GPUS_PER_NODE": "8",
        "A": "b",
    }
    assert step_environ(given) == {"SLURM_JOB_ID": "7", "SLURM_GPUS_PER_NODE": "8", "A": "b"}
