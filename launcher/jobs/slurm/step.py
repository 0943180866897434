"""The command line of one srun step: what starts the agents of an attempt on the hosts of a job."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.jobs.config import ContainerConfig, SlurmConfig

_IMAGE_FILES = (".sqsh", ".sif", ".squashfs", ".img")
# How the batch script's job was asked for. srun would take it for what a step asks for, which says it all itself.
_ASKED_BY_JOB = (
    "SLURM_NTASKS",
    "SLURM_NPROCS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_NTASKS_PER_GPU",
    "SLURM_NTASKS_PER_SOCKET",
    "SLURM_NTASKS_PER_CORE",
    "SLURM_GPUS_PER_TASK",
    "SLURM_THREADS_PER_CORE",
    "SLURM_HINT",
    "SLURM_CPUS_PER_TASK",
    "SLURM_TRES_PER_TASK",
    "SLURM_DISTRIBUTION",
    "SLURM_EXPORT_ENV",
)


def step_command(
    slurm: SlurmConfig,
    *,
    hosts: Sequence[str],
    tasks_per_host: int,
    name: str,
    working_directory: Path,
    run_directory: Path,
    job_id: str,
    device: str,
) -> tuple[str, ...]:
    """Starts agents on `hosts`: `tasks_per_host` on each. `device`: `run.device` of the configuration."""
    container = slurm.container
    return (
        "srun",
        *step_options(hosts, tasks_per_host=tasks_per_host, name=name),
        f"--mpi={slurm.mpi}",
        *_container_options(container, working_directory, run_directory, job_id),
        *slurm.srun_options,
        *_container_prefix(container, working_directory, run_directory, has_gpus=device != "cpu"),
        *agent_command(container),
    )


def step_options(hosts: Sequence[str], *, tasks_per_host: int, name: str) -> tuple[str, ...]:
    """What each of our steps asks for."""
    import hostlist

    return (
        f"--nodes={len(hosts)}",
        f"--nodelist={hostlist.collect_hostlist(hosts)}",
        f"--ntasks={len(hosts) * tasks_per_host}",
        f"--ntasks-per-node={tasks_per_host}",
        "--distribution=block",
        f"--job-name={name}",
        # A step that is not gone yet, because one of its hosts is, keeps its cores: the next one shares them.
        "--overlap",
        # Who has failed, and what follows from it, is the supervisor's matter: srun ends nothing.
        "--no-kill",
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--unbuffered",
        # An agent, or a rank, uses all cores that the job has on its host; SLURM would bind it to one.
        "--cpu-bind=none",
        "--export=ALL",
    )


def step_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for srun."""
    return {name: value for name, value in environ.items() if name not in _ASKED_BY_JOB}


def agent_command(container: ContainerConfig) -> tuple[str, ...]:
    """Starts an agent."""
    return (python_of_ranks(container), "-m", "launcher", "agent")


def python_of_ranks(container: ContainerConfig) -> str:
    """The Python that agents and ranks run in."""
    return sys.executable if container.runtime == "none" else container.python


def is_image_file(image: str) -> bool:
    """Whether it names a file, rather than something in a registry."""
    return "://" not in image and (image.startswith(("/", "./", "../", "~")) or image.endswith(_IMAGE_FILES))


def _container_options(
    container: ContainerConfig, working_directory: Path, run_directory: Path, job_id: str
) -> tuple[str, ...]:
    """Those of pyxis."""
    if container.runtime != "pyxis":
        return ()
    return (
        f"--container-image={container.image}",
        # A host keeps what it has fetched from a registry for the job: the next attempt does not fetch it again.
        *(() if container.image is None or is_image_file(container.image) else (f"--container-name=mega-{job_id}",)),
        f"--container-mounts={','.join(_mounts(container, working_directory, run_directory))}",
        f"--container-workdir={working_directory}",
    )


def _container_prefix(
    container: ContainerConfig, working_directory: Path, run_directory: Path, *, has_gpus: bool
) -> tuple[str, ...]:
    if container.runtime != "apptainer":
        return ()
    return (
        "apptainer",
        "exec",
        *(("--nv",) if has_gpus else ()),
        "--bind",
        ",".join(_mounts(container, working_directory, run_directory)),
        "--pwd",
        str(working_directory),
        str(container.image),
    )


def _mounts(container: ContainerConfig, working_directory: Path, run_directory: Path) -> tuple[str, ...]:
    """As source:target, where the same place is meant too: pyxis wants both."""
    own = [str(working_directory), str((working_directory / run_directory).absolute())]
    given = [mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts]
    return tuple(dict.fromkeys([*(f"{path}:{path}" for path in own), *given]))
