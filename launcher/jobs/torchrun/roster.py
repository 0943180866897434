"""The hosts of a job under torchrun, each of which runs `mega launch --on torchrun`: who may lead, and which one this is."""

from __future__ import annotations

import re
import socket
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.errors import ConfigError
from launcher.jobs.agents.host_names import find_host, is_loopback, own_addresses
from launcher.jobs.hostfile import ListedHost

# Below the ports that a kernel gives out by itself (Linux: from 32768), and those of steps of SLURM.
_FIRST_PORT, _NUM_PORTS = 30000, 2700


@dataclass(frozen=True, kw_only=True)
class Roster:
    """Where a host stands among the others."""

    leaders: tuple[str, ...]
    """Names or addresses of the hosts that may lead, the first one that is there before the others."""
    place: int | None
    """This host's among `leaders`; None where it may not lead."""
    name: str
    """Of this host in the job."""
    rank: int
    """Orders the hosts of the job: their ranks come in blocks in this order."""
    port: int
    """At which a leader listens; 0: nobody else needs to know."""

    @property
    def others(self) -> tuple[str, ...]:
        """Those who may lead besides this host."""
        return tuple(host for place, host in enumerate(self.leaders) if place != self.place)

    @property
    def before(self) -> tuple[str, ...]:
        """Those who lead rather than this host."""
        return self.leaders if self.place is None else self.leaders[: self.place]


def read_roster(
    *,
    run_name: str,
    nodes: int,
    hosts: Sequence[ListedHost],
    node_rank: int | None,
    rendezvous: str | None,
) -> Roster:
    """The roster that the options of `mega launch --on torchrun` give. Raises ConfigError where they make no sense together.

    `hosts`: of the hostfile. Without it `node_rank` of `nodes` hosts, and `rendezvous`, or this host alone.
    """
    if hosts:
        return _of_hostfile(run_name, nodes, hosts, node_rank, rendezvous)
    if node_rank is None and rendezvous is None:
        if nodes > 1:
            raise ConfigError(
                f"launch.nodes = {nodes}: --on torchrun must know of the other hosts: give --hostfile FILE on each host, or "
                "--node-rank K and --rendezvous HOST:PORT"
            )
        return Roster(leaders=(socket.gethostname(),), place=0, name=socket.gethostname(), rank=0, port=0)
    if node_rank is None or rendezvous is None:
        lacking = "--node-rank K" if node_rank is None else "--rendezvous HOST:PORT"
        raise ConfigError(f"--on torchrun: {lacking} is missing: --node-rank and --rendezvous go together")
    if node_rank >= nodes:
        raise ConfigError(
            f"--node-rank {node_rank}: of {nodes} {'host' if nodes == 1 else 'hosts'} (--nodes), which count from 0"
        )
    host, port = _host_and_port(rendezvous)
    # On one machine, to try it, several have the same name.
    name = f"{socket.gethostname()}.{node_rank}" if host == "localhost" or is_loopback(host) else socket.gethostname()
    return Roster(leaders=(host,), place=0 if node_rank == 0 else None, name=name, rank=node_rank, port=port)


def _of_hostfile(
    run_name: str, nodes: int, hosts: Sequence[ListedHost], node_rank: int | None, rendezvous: str | None
) -> Roster:
    if node_rank is not None:
        raise ConfigError("--node-rank: a host finds its place in the hostfile by itself: leave --node-rank out")
    names = tuple(host.name for host in hosts)
    if nodes > len(names):
        raise ConfigError(f"launch.nodes = {nodes}: the hostfile lists {len(names)}; list more hosts, or lower it")
    own = find_host(socket.gethostname(), own_addresses(), names)
    if own is None:
        here = ", ".join((socket.gethostname(), *own_addresses()))
        raise ConfigError(f"this host ({here}) is not in the hostfile, or several lines of it mean this host")
    port = _FIRST_PORT + zlib.crc32(run_name.encode()) % _NUM_PORTS
    leaders, place = names, names.index(own)
    if rendezvous is not None:
        first, port = _host_and_port(rendezvous)
        is_own = find_host(socket.gethostname(), own_addresses(), (first,)) is not None
        # The others come after it, in their order.
        leaders = (first, *(name for name in names if name != (own if is_own else first)))
        place = 0 if is_own else leaders.index(own)
    return Roster(leaders=leaders, place=place, name=own, rank=names.index(own), port=port)


def _host_and_port(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"\[?([^\s\[\]]+)\]?:(\d+)", text)
    if match is None or not 0 < int(match[2]) < 1 << 16:
        raise ConfigError(f"--rendezvous {text}: must be HOST:PORT, such as node1:29400")
    return match[1], int(match[2])
