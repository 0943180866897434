"""Too few hosts, in words: how many there are, who is not there, and what may bring them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Collection, Sequence

from launcher.jobs.config import LaunchConfig

_MENDS = {
    "torchrun": "start the same command there, and see that the names of all hosts resolve and that their ports are open",
    "slurm": "`sinfo -R` tells why SLURM has taken a host out of service",
}
_RESOLVE_S = 2.0
_SHOWN = 8


def host_count(number: int, where: str, launch: LaunchConfig) -> str:
    """ "1 host is there, and 2 needed (launch.nodes)"."""
    have = "1 host is" if number == 1 else f"{number} hosts are" if number else "no host is"
    key = "launch.nodes" if launch.min_nodes is None else "launch.min_nodes"
    return f"{have} {where}, and {launch.fewest_nodes} needed ({key})"


async def not_there(backend: str, missing: Sequence[str]) -> str:
    """ "; not there: n1: ..." with the mend; empty where nobody is known to be missing."""
    if not missing:
        return ""
    shown = list(missing[:_SHOWN])
    unknown = await _unresolved(shown) if backend == "torchrun" else ()
    names = ", ".join(f"{host} (its name does not resolve here)" if host in unknown else host for host in shown)
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    mend = f": {_MENDS[backend]}" if backend in _MENDS else ""
    return f"; not there: {names}{more}{mend}"


async def _unresolved(hosts: Sequence[str]) -> Collection[str]:
    """A resolver that is slow says nothing of a name."""

    async def is_unknown(host: str) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RESOLVE_S):
                try:
                    await asyncio.get_running_loop().getaddrinfo(host, None)
                except socket.gaierror:
                    return True
        return False

    # One without a hostfile has no name yet, but a description.
    named = [host for host in hosts if " " not in host]
    found = await asyncio.gather(*map(is_unknown, named))
    return {host for host, unknown in zip(named, found, strict=True) if unknown}
