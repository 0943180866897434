"""What `mega launch --dry-run` shows: what would be submitted or started, and what ranks would find in their environment."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import NetworkError
from cluster.network_settings import choose_network
from launcher.errors import RunError
from launcher.fabric_place import RANK_HOSTS
from launcher.jobs.agents.protocol import CHOSEN
from launcher.jobs.backends.local import AGENT_COMMAND
from launcher.jobs.backends.mpi import find_mpirun
from launcher.jobs.backends.slurm import RUN
from launcher.jobs.slurm.step import step_command
from launcher.jobs.submission.plan import LaunchPlan
from launcher.jobs.torchrun.host_agent import AGENT_COMMAND as TORCHRUN_AGENT_COMMAND
from launcher.rank_process import SUPERVISOR_PID


@dataclass(frozen=True, kw_only=True)
class Variable:
    """A variable in the environment of ranks."""

    name: str
    value: str
    reason: str


def starter_command(plan: LaunchPlan, *, working_directory: Path, environ: Mapping[str, str]) -> str:
    """What starts the agents of the first attempt, as one would type it. Which hosts shows then."""
    nodes = plan.config.launch.nodes
    if plan.backend == "slurm":
        slurm = plan.config.slurm
        command = step_command(
            slurm,
            hosts=[f"HOST{number}" for number in range(1, nodes + 1)],
            tasks_per_host=plan.ranks_per_host if slurm.mpi == "pmix" else 1,
            name="attempt-1",
            working_directory=working_directory,
            run_directory=plan.run.root,
            job_id="JOB",
            device=plan.config.run.device,
        )
        return shlex.join(command)
    if plan.backend == "mpi":
        hosts = ",".join(host.name for host in plan.hosts[:nodes]) or socket.gethostname()
        return shlex.join([_mpirun(environ), "-n", str(nodes), "--host", hosts, *AGENT_COMMAND])
    if plan.backend == "torchrun":
        options = f"--nnodes {nodes} --nproc-per-node {plan.ranks_per_host} --node-rank K --rdzv-endpoint HOST1:PORT"
        return f"{shlex.join(TORCHRUN_AGENT_COMMAND)}\n  which starts: torchrun {options} --rdzv-backend static --max-restarts 0"
    return shlex.join(AGENT_COMMAND)


def _mpirun(environ: Mapping[str, str]) -> str:
    try:
        return find_mpirun(environ)
    except RunError:
        return "mpirun"


def variables_of_ranks(plan: LaunchPlan, environ: Mapping[str, str]) -> list[Variable]:
    """What ranks find in their environment besides what is there now."""
    launch, ranks, each = plan.config.launch, plan.num_ranks, plan.ranks_per_host
    own = [
        Variable(name="RANK, WORLD_SIZE", value=f"0 to {ranks - 1}, {ranks}", reason="hosts in order, blocks of ranks"),
        Variable(name="LOCAL_RANK, LOCAL_WORLD_SIZE", value=f"0 to {each - 1}, {each}", reason="place on the host"),
        Variable(
            name="MASTER_ADDR, MASTER_PORT",
            value="127.0.0.1, a free port" if launch.nodes == 1 else "address of rank 0's host, a free port there",
            reason="where the ranks meet; found in each attempt",
        ),
        Variable(name="MEGA_ATTEMPT, MEGA_HOST_NAME", value="1, the host's name", reason="for logs and events"),
        Variable(
            name="MEGA_FAILURE_FILE",
            value=f"{plan.run.logs}/attempt-1/rank-R.failure.json",
            reason="where a rank leaves why it failed",
        ),
        Variable(name=RANK_HOSTS, value="names of the hosts", reason="in the order of their ranks"),
        Variable(name=SUPERVISOR_PID, value="a process", reason="which the rank dies with: its agent, or torchrun"),
    ]
    if plan.backend == "slurm":
        own.append(Variable(name=RUN, value=str(plan.run.root), reason="tells on a host whose process it is"))
    if not environ.get("OMP_NUM_THREADS"):
        threads = "OMP_NUM_THREADS"
        own.append(Variable(name=threads, value=f"cores / {each}", reason="the ranks of a host share its cores"))
        own.append(Variable(name=CHOSEN, value=threads, reason="hosts may differ in it, by what they have"))
    if launch.preflight.enabled:
        path = f"{plan.run.logs}/attempt-1/preflight.json"
        own.append(Variable(name="MEGA_PREFLIGHT", value=path, reason="launch.preflight.enabled: the verdict"))
    return [*own, *_network(plan, environ)]


def _network(plan: LaunchPlan, environ: Mapping[str, str]) -> list[Variable]:
    """As this host would choose; each host of the job chooses for itself."""
    if plan.config.launch.nodes == 1:
        return []
    try:
        choice = choose_network(plan.config.launch.network, environ, host=socket.gethostname())
    except NetworkError as error:
        return [Variable(name="NCCL_...", value="not known here", reason=f"each host chooses by what it has; {error}")]
    settings = [*choice.settings, *choice.kept]
    listed = [Variable(name=each.name, value=each.value, reason=each.reason) for each in settings]
    by_interface = "NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME"
    return [*listed, Variable(name=by_interface, value="an interface", reason="the one that leads to rank 0's host")]


def as_data(variables: list[Variable]) -> dict[str, Any]:
    """For JSON."""
    return {each.name: {"value": each.value, "reason": each.reason} for each in variables}
