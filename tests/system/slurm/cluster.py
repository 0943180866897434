"""SLURM itself on several hosts of one machine: a controller, a slurmd a host, and jobs that run on "their" hosts.

Hosts are those of `FabricOfHosts`, named h0, h1, ...; the controller has one of its own, x0, where commands run too unless
told otherwise. A process of a host has its network, its name and its /etc/hosts. Files are shared by all, as on a cluster
file system. Needs root, what `FabricOfHosts` needs, and slurm-wlm, munge and (for MPI) libpmix.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tests.system.fabric.hosts import FabricOfHosts
from tests.system.host_processes import HostProcesses
from tests.system.slurm.configuration import CONTROLLER, write_configuration

LINK_MBIT = 400.0
"""Of every host: more than two cores move for several hosts at once."""
MPI_ENVIRONMENT = {
    "OMPI_MCA_btl": "self,tcp",
    "OMPI_MCA_btl_tcp_if_include": "eth0",
    "OMPI_MCA_pml": "ob1",
}
"""For the programs of an `srun --mpi=pmix` step: OpenMPI uses the hosts' links, and nothing that only one machine has."""
_START_SECONDS = 150.0
_COMMAND_SECONDS = 60.0
_POLL_SECONDS = 0.1
_FIELD = re.compile(r"(\S+?)=(.*?)(?= [A-Z][\w/:.]*=|$)")
_LOG_LINES = 40


class SlurmOfHosts:
    """A context: within it SLURM schedules `num_hosts + spare` hosts, all idle at first.

    Its partitions are `low`, whose jobs are requeued for those of `high`; only where they need the same CPUs, of which a
    host has four: give both `--exclusive`. num_leaves: leaf switches, one or two, that share the hosts evenly and are
    SLURM's topology. link_mbit: of every host, see `set_rate`. settings: more lines of slurm.conf.
    """

    def __init__(
        self,
        *,
        num_hosts: int = 4,
        spare: int = 0,
        num_leaves: int = 1,
        link_mbit: float = LINK_MBIT,
        settings: Sequence[str] = (),
    ) -> None:
        if (num_hosts + spare) % num_leaves:
            raise ValueError(f"{num_hosts + spare} hosts on {num_leaves} leaves")
        hosts_per_leaf = (num_hosts + spare) // num_leaves
        self.fabric = FabricOfHosts(
            hosts_per_leaf=hosts_per_leaf, num_leaves=num_leaves, foreign_per_leaf=1, link_mbit=link_mbit
        )
        self._settings = tuple(settings)
        self.names = tuple(host.name for host in self.fabric.hosts)
        """Of all nodes, spare ones too."""
        self.directory = Path()
        """Configuration, logs and state; also for the scripts and output of tests."""
        self._slurmds: dict[str, subprocess.Popen[str]] = {}
        self._processes = HostProcesses(self.fabric)
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            # With the maker's number: a killed maker leaves the directory, and nobody should take a living one's for that.
            prefix = f"slurm-of-hosts-{os.getpid()}-"
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix)))
            stack.enter_context(self.fabric)
            stack.callback(self._processes.end)
            write_configuration(self.directory, self.fabric, self._settings)
            self._start()
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    @property
    def configuration(self) -> Path:
        """The slurm.conf. SLURM_CONF points there in every process of this cluster."""
        return self.directory / "slurm.conf"

    def popen(
        self, *command: str, host: str = CONTROLLER, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """The command started on `host`, with `env` besides the own environment. `options` are those of Popen.

        It is that very process, to be signalled as it is. Killed at the end.
        """
        environ = {**os.environ, "SLURM_CONF": str(self.configuration), **(env or {})}
        return self._processes.start(host, command, text=True, env=environ, **options)

    def run(
        self,
        *command: str,
        host: str = CONTROLLER,
        env: Mapping[str, str] | None = None,
        timeout: float = _COMMAND_SECONDS,
        check: bool = True,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """The command run on `host` to its end. Raises CommandError where it fails (unless `check` is off) or takes longer."""
        process = self.popen(*command, host=host, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise CommandError(f"{' '.join(command)} took more than {timeout:g} s\n{out}{err}\n{self.logs()}") from None
        if check and process.returncode:
            raise CommandError(f"{' '.join(command)} failed ({process.returncode})\n{out}{err}\n{self.logs()}")
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def submit(
        self, *command: str, options: Sequence[str] = (), env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> int:
        """The number of a batch job that execs the command on its first host. Its output is at `output(number)`."""
        script = "#!/bin/sh\n" + f"exec {shlex.join(command)}\n"
        path = self.directory / f"job-{time.monotonic_ns()}.sh"
        path.write_text(script)
        out = str(self.directory / "job-%j.out")
        where = ["--chdir", str(cwd or self.directory), "--output", out, "--open-mode=append"]
        return int(self.run("sbatch", "--parsable", *where, *options, str(path), env=env).stdout.split(";")[0])

    def output(self, job_id: int) -> str:
        """What a job made by `submit` printed so far, over all its starts."""
        path = self.directory / f"job-{job_id}.out"
        return path.read_text() if path.exists() else ""

    def job(self, job_id: int) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return _fields(self.run("scontrol", "--oneliner", "show", "job", str(job_id)).stdout)

    def node(self, name: str) -> dict[str, str]:
        """The fields of `scontrol show node`; State may end in `*` (does not answer) and name several by `+`."""
        return _fields(self.run("scontrol", "--oneliner", "show", "node", name).stdout)

    def wait_for(self, job_id: int, states: str | Sequence[str], timeout: float) -> dict[str, str]:
        """The job's fields once its JobState is among `states`. Raises CommandError where that takes longer."""
        wanted = (states,) if isinstance(states, str) else tuple(states)
        return self._wait(lambda: self.job(job_id), "JobState", lambda state: state in wanted, wanted, timeout)

    def wait_for_node(self, name: str, state: str, timeout: float) -> dict[str, str]:
        """The node's fields once its State begins with `state`. Raises CommandError where that takes longer."""
        return self._wait(lambda: self.node(name), "State", lambda seen: seen.startswith(state), (state,), timeout)

    def processes(self, host: str) -> list[psutil.Process]:
        """All that runs on the host, slurmd too."""
        return self._processes.on(host)

    def kill_host(self, name: str) -> None:
        """The host loses its power: all on it is gone, and nobody hears a goodbye."""
        self.link_down(name)
        self._processes.kill_all(name)

    def revive_host(self, name: str) -> None:
        """The host starts again: its link comes up, and slurmd."""
        self.link_up(name)
        self._start_slurmd(name)

    def kill_slurmd(self, name: str) -> None:
        """Kills slurmd only; steps stay. `revive_host` starts it again."""
        self._slurmds[name].kill()
        self._slurmds[name].wait()

    def link_down(self, name: str) -> None:
        """The host's cable is out, at the switch's end."""
        self._processes.set_link(name, "down")

    def link_up(self, name: str) -> None:
        """The cable is in again."""
        self._processes.set_link(name, "up")

    def set_rate(self, name: str, mbit: float | None = None) -> None:
        """Shapes the host's link, each way; None: as it was made."""
        host = self.fabric.host_named(name)
        self.fabric.set_rate_out(host, mbit)
        self.fabric.set_rate_in(host, mbit)

    def logs(self) -> str:
        """The ends of the daemons' logs and of the jobs' output, for the one who reads of a failure."""
        # A daemon says all twice once it has a log: only before that its standard error tells more.
        errors = [path for path in self.directory.glob("*.stderr") if not path.with_suffix(".log").exists()]
        parts = []
        for path in sorted([*errors, *self.directory.glob("*.log"), *self.directory.glob("job-*.out")]):
            lines = path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
            parts.append("\n".join([f"--- {path.name}", *lines]))
        return "\n".join(parts)

    def _start(self) -> None:
        socket, key = self.directory / "munge.sock", self.directory / "munge.key"
        names = {"--socket": socket, "--key-file": key}
        names |= {"--pid-file": self.directory / "munged.pid", "--seed-file": self.directory / "munged.seed"}
        self._daemon("munged", "--foreground", "--force", *(f"{name}={path}" for name, path in names.items()))
        deadline = time.monotonic() + _START_SECONDS
        while not socket.exists():
            if time.monotonic() > deadline:
                raise CommandError(f"munged does not start\n{self.logs()}")
            time.sleep(0.01)
        self._daemon("slurmctld", "-D", "-i")
        for name in self.names:
            self._start_slurmd(name)
        while (states := self._states()) != {"idle"}:
            if time.monotonic() > deadline:
                raise CommandError(f"nodes are {states}, not idle\n{self.logs()}")
            time.sleep(_POLL_SECONDS)

    def _states(self) -> set[str]:
        # While the controller starts, a client waits for its answer longer than it takes to ask again.
        with contextlib.suppress(CommandError):
            return set(self.run("sinfo", "--noheader", "--format=%t", timeout=5.0).stdout.split())
        return set()

    def _start_slurmd(self, name: str) -> None:
        self._slurmds[name] = self._daemon("slurmd", "-D", "-N", name, host=name)

    def _daemon(self, *command: str, host: str = CONTROLLER) -> subprocess.Popen[str]:
        with open(self.directory / f"{command[0]}-{host}.stderr", "a") as log:
            return self.popen(*command, host=host, stdout=log, stderr=log)

    def _wait(
        self,
        look: Callable[[], dict[str, str]],
        field: str,
        is_wanted: Callable[[str], bool],
        wanted: Sequence[str],
        timeout: float,
    ) -> dict[str, str]:
        deadline = time.monotonic() + timeout
        while True:
            fields: dict[str, str] = {}
            # On a busy machine the controller may be late with one of many answers.
            with contextlib.suppress(CommandError):
                fields = look()
                if is_wanted(fields[field]):
                    return fields
            if time.monotonic() > deadline:
                seen = " ".join(f"{name}={value}" for name, value in fields.items())
                raise CommandError(f"{field} is not {' or '.join(wanted)} after {timeout:g} s: {seen}\n{self.logs()}")
            time.sleep(_POLL_SECONDS)


class CommandError(AssertionError):
    """A command failed or took too long. The message has what it printed, and the logs."""


def _fields(line: str) -> dict[str, str]:
    return {name: value.strip() for name, value in _FIELD.findall(line.strip())}
