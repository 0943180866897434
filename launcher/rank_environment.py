"""Where rank, number of ranks, place on the host and meeting point come from: the one place that knows.

Everything else in this system reads torchrun's variables. `adopt` writes them from what another launcher has set:

| started by | rank, ranks | place on its host, ranks there |
|---|---|---|
| torchrun, `mega --ranks` | RANK, WORLD_SIZE | LOCAL_RANK, LOCAL_WORLD_SIZE |
| mpirun (Open MPI) | OMPI_COMM_WORLD_RANK, .._SIZE | OMPI_COMM_WORLD_LOCAL_RANK, .._LOCAL_SIZE |
| mpiexec (MPICH, Intel MPI) | PMI_RANK, PMI_SIZE | MPI_LOCALRANKID, MPI_LOCALNRANKS |
| srun | SLURM_PROCID, SLURM_STEP_NUM_TASKS | SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE |

The ranks meet at MASTER_ADDR, MASTER_PORT wherever these are set; else, under MPI, at rank 0's host, which MPI tells to all;
under srun at the first host of the step, at a port by job and step.

The first row whose rank and number are set counts. mpirun stands before srun, since inside a SLURM job it starts its own
daemons with srun. A batch script's shell has SLURM's variables too, and is no rank: only a step of several tasks makes ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, MutableMapping

from launcher.errors import ConfigError

_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
# Below the ports that a kernel gives out by itself (Linux: from 32768).
_FIRST_PORT, _NUM_PORTS = 15000, 15000


def is_rank(environ: Mapping[str, str]) -> bool:
    """Whether some launcher of the table has made this process a rank, or a lone one."""
    return any(name in environ for name in ("RANK", *(row[0] for row in _MPI))) or "SLURM_STEP_ID" in environ


def adopt(environ: MutableMapping[str, str], *, meet_over_mpi: Callable[[], tuple[str, int]]) -> None:
    """Adds torchrun's variables to `environ` where mpirun or srun has made this process a rank of several.

    `meet_over_mpi` gives the host name and a free port of rank 0, to every rank; it is a collective of the MPI job.
    Raises ConfigError where a launcher's variables make no sense.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return
    for rank, size, local_rank, local_size in _MPI:
        if rank in environ and size in environ:
            if _number(environ, size) > 1:
                address, port = _given_address(environ) or meet_over_mpi()
                _write(
                    environ,
                    rank=_number(environ, rank),
                    world_size=_number(environ, size),
                    local_rank=_number(environ, local_rank),
                    local_world_size=_number(environ, local_size),
                    address=address,
                    port=port,
                )
            return
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ and _number(environ, "SLURM_STEP_NUM_TASKS") > 1:
        address, port = _given_address(environ) or _slurm_address(environ)
        _write(
            environ,
            rank=_number(environ, "SLURM_PROCID"),
            world_size=_number(environ, "SLURM_STEP_NUM_TASKS"),
            local_rank=_number(environ, "SLURM_LOCALID"),
            local_world_size=_tasks_here(environ),
            address=address,
            port=port,
        )


def hosts_of_ranks(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Host of each rank of a step of SLURM, where ranks are dealt out in blocks; empty where nobody tells.

    So a rank that never came has a host too. Only torchrun's own variables say nothing of the others.
    """
    if not {"SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"} <= environ.keys():
        return ()
    if environ.get("SLURM_DISTRIBUTION", "block").split(":")[0].split(",")[0] != "block":
        return ()
    names, counts = _slurm_hosts(environ), _slurm_tasks(environ)
    hosts = tuple(name for name, count in zip(names, counts) for _ in range(count))
    return hosts if str(len(hosts)) == environ.get("WORLD_SIZE") else ()


def leaf_switch(environ: Mapping[str, str]) -> str | None:
    """The switch that this host hangs from, where SLURM knows its topology: `SLURM_TOPOLOGY_ADDR`, such as
    "core1.leaf7.n42" with the pattern "switch.switch.node". None where it does not, or the host is all that it names.
    """
    names = environ.get("SLURM_TOPOLOGY_ADDR", "").split(".")
    kinds = environ.get("SLURM_TOPOLOGY_ADDR_PATTERN", "").split(".")
    switches = [name for name, kind in zip(names, kinds) if kind == "switch"] if len(names) == len(kinds) else []
    return switches[-1] if switches else None


def _write(
    environ: MutableMapping[str, str],
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    local_world_size: int,
    address: str,
    port: int,
) -> None:
    environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(local_rank),
        LOCAL_WORLD_SIZE=str(local_world_size),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )


def _given_address(environ: Mapping[str, str]) -> tuple[str, int] | None:
    if environ.get("MASTER_ADDR") and environ.get("MASTER_PORT"):
        return environ["MASTER_ADDR"], _number(environ, "MASTER_PORT")
    return None


def _slurm_address(environ: Mapping[str, str]) -> tuple[str, int]:
    # Every step of every job on a host meets elsewhere.
    number = _number(environ, "SLURM_JOB_ID") * 101 + _number(environ, "SLURM_STEP_ID")
    return _slurm_hosts(environ)[0], _FIRST_PORT + number % _NUM_PORTS


def _slurm_hosts(environ: Mapping[str, str]) -> list[str]:
    import hostlist

    text = environ.get("SLURM_STEP_NODELIST", "")
    try:
        hosts: list[str] = hostlist.expand_hostlist(text)
    except hostlist.BadHostlist:
        hosts = []
    if not hosts:
        raise ConfigError(
            f"SLURM_STEP_NODELIST={text!r} in the environment is not a list of hosts: set MASTER_ADDR and MASTER_PORT"
        )
    return hosts


def _tasks_here(environ: Mapping[str, str]) -> int:
    counts, node = _slurm_tasks(environ), _number(environ, "SLURM_NODEID")
    if node >= len(counts):
        text = environ["SLURM_STEP_TASKS_PER_NODE"]
        raise ConfigError(f"SLURM_NODEID={node} is beyond SLURM_STEP_TASKS_PER_NODE={text!r} in the environment")
    return counts[node]


def _slurm_tasks(environ: Mapping[str, str]) -> list[int]:
    """Tasks of each host, from `SLURM_STEP_TASKS_PER_NODE` such as "4(x3),2"."""
    counts: list[int] = []
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    for part in text.split(","):
        if (match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())) is None:
            raise ConfigError(
                f"SLURM_STEP_TASKS_PER_NODE={text!r} in the environment is not a list of numbers of tasks"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "").strip()
    if not text.isdecimal():
        shown = repr(environ[name]) if name in environ else "not set"
        raise ConfigError(f"{name} is {shown} in the environment, and must be a whole number here")
    return int(text)
