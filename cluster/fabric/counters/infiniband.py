"""Counters of InfiniBand and RoCE ports: `sys/class/infiniband/<device>/ports/<port>/`.

Source: the kernel's Documentation/ABI/stable/sysfs-class-infiniband.
"""

from __future__ import annotations

import re

from cluster.fabric.counters.snapshot import Count, Snapshot
from cluster.fabric.counters.sources import Sources

_DEVICES = "sys/class/infiniband"
_WORDS_OF_FOUR_BYTES = frozenset({"port_xmit_data", "port_rcv_data"})


def read(sources: Sources) -> Snapshot:
    """`infiniband/<device>:<port>/...`: counters and hw_counters under their own names, data in `_bytes`; `is_down`, and
    the rate in bytes a second. On RoCE also `lacks_roce_v2`: no address that can be routed."""
    counts: dict[str, Count] = {}
    states: dict[str, float] = {}
    for device in sources.names(_DEVICES):
        for port in sources.names(f"{_DEVICES}/{device}/ports"):
            folder, name = f"{_DEVICES}/{device}/ports/{port}", f"infiniband/{device}:{port}"
            for kind in ("counters", "hw_counters"):
                for counter, value in sources.numbers(f"{folder}/{kind}"):
                    if counter in _WORDS_OF_FOUR_BYTES:
                        counts[f"{name}/{counter}_bytes"] = Count(value=value, unit=4.0)
                    elif counter != "lifespan":  # how long the kernel keeps a reading, no counter
                        counts[f"{name}/{counter}"] = Count(value=value)
            states |= {f"{name}/{state}": value for state, value in _states(sources, folder).items()}
    return Snapshot(counts=counts, states=states)


def _states(sources: Sources, folder: str) -> dict[str, float]:
    """Files read `4: ACTIVE`, `5: LinkUp`, `400 Gb/sec (4X NDR)`, `Ethernet`, `RoCE v2`."""
    states: dict[str, float] = {}
    if logical := sources.text(f"{folder}/state"):
        physical = sources.text(f"{folder}/phys_state")
        states["is_down"] = float("ACTIVE" not in logical or "LinkUp" not in (physical or "LinkUp"))
    if rate := re.match(r"([\d.]+) Gb/sec", sources.text(f"{folder}/rate")):
        states["rate_bytes_per_s"] = float(rate[1]) * 1e9 / 8
    if sources.text(f"{folder}/link_layer").strip() == "Ethernet" and (
        gids := sources.names(f"{folder}/gid_attrs/types")
    ):
        # Hundreds of entries, of which the first few are in use: the search ends at the first that is found.
        has_one = any("RoCE v2" in sources.text(f"{folder}/gid_attrs/types/{gid}") for gid in sorted(gids, key=int))
        states["lacks_roce_v2"] = float(not has_one)
    return states
