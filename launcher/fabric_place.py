"""A rank's place in the world that measures the fabric, from torchrun's variables."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from launcher.jobs.agents.protocol import HOST_NAME
from launcher.rank_environment import hosts_of_ranks, leaf_switch

if TYPE_CHECKING:
    from cluster.fabric.measured.place import FabricPlace

RANK_HOSTS = "MEGA_RANK_HOSTS"
"""Names of the hosts of a job's ranks, by commas, in the order of ranks, each with as many ranks as the others. So a rank that
never came has a host too. Optional."""


def rank_hosts_variable(hosts: Sequence[str]) -> dict[str, str]:
    """What a job adds to the environment of ranks that it starts on these hosts."""
    return {RANK_HOSTS: ",".join(hosts)}


def fabric_place(environ: Mapping[str, str], *, host_name: str | None = None, leaf: str | None = None) -> FabricPlace:
    """The place. `host_name` and `leaf` count before what the environment, the host and SLURM say."""
    from cluster.fabric.measured.place import FabricPlace

    return FabricPlace(
        rank=int(environ["RANK"]),
        world_size=int(environ["WORLD_SIZE"]),
        local_rank=int(environ.get("LOCAL_RANK", "0")),
        local_world_size=int(environ.get("LOCAL_WORLD_SIZE", "1")),
        address=f"{environ.get('MASTER_ADDR', '127.0.0.1')}:{environ.get('MASTER_PORT', '29500')}",
        host=host_name or environ.get(HOST_NAME) or socket.gethostname(),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        hosts=_hosts_of_job(environ) or hosts_of_ranks(environ),
        leaf=leaf or leaf_switch(environ),
    )


def _hosts_of_job(environ: Mapping[str, str]) -> tuple[str, ...]:
    names = [name for name in environ.get(RANK_HOSTS, "").split(",") if name]
    ranks_per_host, left = divmod(int(environ["WORLD_SIZE"]), max(len(names), 1))
    return () if left else tuple(name for name in names for _ in range(ranks_per_host))
