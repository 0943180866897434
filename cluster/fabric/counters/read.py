"""All counters of this host, below a root folder."""

from __future__ import annotations

from pathlib import Path

from cluster.fabric.counters import host, infiniband, network
from cluster.fabric.counters.snapshot import Count, Snapshot
from cluster.fabric.counters.sources import Sources


def read_counters(root: Path = Path("/")) -> Snapshot:
    """Counters of this host and, for network counters, of the network namespace of the calling process.

    What a host lacks is left out; nothing is raised. Below the root `/`, `ethtool -S`, `tc` and `nvidia-smi` are asked as
    well; below another one their recorded answers are read from its folder `recorded` (for tests, and for hosts that were
    recorded elsewhere). Takes some milliseconds; with NVIDIA's driver up to a second.
    """
    sources = Sources(root)
    counts: dict[str, Count] = {}
    states: dict[str, float] = {}
    for snapshot in (infiniband.read(sources), network.read(sources), host.read(sources)):
        counts |= snapshot.counts
        states |= snapshot.states
    return Snapshot(counts=counts, states=states)
