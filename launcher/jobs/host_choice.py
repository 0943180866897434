"""Which hosts train in the next attempt, and with how many ranks. Pure, but for counting this host's GPUs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from launcher.place import num_usable_gpus

if TYPE_CHECKING:
    from launcher.config import RunConfig


def ranks_on_a_host(config: RunConfig, environ: Mapping[str, str]) -> int:
    """Ranks of each host: `launch.ranks_per_node`, else one a GPU of this host, else one."""
    if config.launch.ranks_per_node is not None:
        return config.launch.ranks_per_node
    return max(1, num_usable_gpus(environ)) if config.run.device != "cpu" else 1


def choose_hosts(
    available: Sequence[str],
    *,
    nodes: int,
    fewest: int,
    fits: Callable[[int], bool],
    doubtful: Collection[str] = (),
    missing: Collection[str] = (),
) -> tuple[str, ...]:
    """The hosts that train, in the order of `available`; empty where there are too few.

    As many as `nodes`, or the largest number from `fewest` on of which `fits` says that the run can be laid out on it.
    `doubtful` hosts, which have just failed, stand behind the others, the spares; `missing` ones, which have just not been
    there, are taken only where nothing goes without them.
    """
    sound = [host for host in available if host not in missing and host not in doubtful]
    doubted = [host for host in available if host in doubtful and host not in missing]
    absent = [host for host in available if host in missing]
    for candidates in ([*sound, *doubted], [*sound, *doubted, *absent]):
        for count in range(min(nodes, len(candidates)), fewest - 1, -1):
            if fits(count):
                chosen = set(candidates[:count])
                return tuple(host for host in available if host in chosen)
    return ()
