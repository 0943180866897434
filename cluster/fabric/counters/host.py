"""What holds a host's processors and GPUs back: CPU quota, thieves of time, heat, power; errors of GPUs' own links."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from cluster.fabric.counters.snapshot import Count, Snapshot
from cluster.fabric.counters.sources import Sources

_CGROUP = "sys/fs/cgroup"
_TICKS_PER_S = 100  # USER_HZ, the unit of /proc/stat, is 100 on every architecture that Linux runs training on
_GPU_QUERY = ("nvidia-smi", "--query-gpu=index,clocks_throttle_reasons.active", "--format=csv,noheader,nounits")
# Bits of nvml.h's nvmlClocksThrottleReason*. An idle GPU, and clocks set by hand, are no faults.
_GPU_REASONS = {
    0x04: "power_cap",
    0x08: "hw_slowdown",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "power_brake",
}


def read(sources: Sources) -> Snapshot:
    """`cgroup/<path>/...`, `cpu/host/...`, `gpu/<index>/...` and `nvlink/<index>/...`."""
    counts = _quota(sources) | _processor(sources)
    states: dict[str, float] = {}
    if sources.has("proc/driver/nvidia/version"):
        counts |= _nvlink(sources)
        states |= _gpu_clocks(sources)
    return Snapshot(counts=counts, states=states)


def _quota(sources: Sources) -> dict[str, Count]:
    """How often and for how long this process's control groups, and those above them, ran out of their CPU quota."""
    counts: dict[str, Count] = {}
    for line in sources.text("proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folders = [_CGROUP, f"{_CGROUP}/unified"]
        elif "cpu" in controllers.split(","):
            folders = [f"{_CGROUP}/cpu", f"{_CGROUP}/{controllers}"]
        else:
            continue
        for level in (PurePosixPath(path), *PurePosixPath(path).parents):
            for folder in folders:
                figures = dict(re.findall(r"^(\w+) (\d+)$", sources.text(f"{folder}{level}/cpu.stat"), re.MULTILINE))
                # Both versions may be mounted at once; the one without the cpu controller does not count throttling.
                if "nr_throttled" in figures:
                    counts |= _throttling(f"cgroup/{str(level).strip('/').replace('/', '.') or 'root'}", figures)
    return counts


def _throttling(name: str, figures: dict[str, str]) -> dict[str, Count]:
    if "throttled_usec" in figures:  # version 2
        held_back = Count(value=int(figures["throttled_usec"]), unit=1e-6)
    else:
        held_back = Count(value=int(figures.get("throttled_time", "0")), unit=1e-9)
    return {f"{name}/nr_throttled": Count(value=int(figures["nr_throttled"])), f"{name}/throttled_s": held_back}


def _processor(sources: Sources) -> dict[str, Count]:
    counts: dict[str, Count] = {}
    if total := re.match(r"cpu +(?:\d+ +){7}(\d+)", sources.text("proc/stat")):
        counts["cpu/host/steal_s"] = Count(value=int(total[1]), unit=1 / _TICKS_PER_S)
    cores = [name for name in sources.names("sys/devices/system/cpu") if re.fullmatch(r"cpu\d+", name)]
    slowed = [sources.number(f"sys/devices/system/cpu/{core}/thermal_throttle/core_throttle_count") for core in cores]
    if known := [number for number in slowed if number is not None]:
        counts["cpu/host/thermal_throttle_events"] = Count(value=sum(known))
    return counts


def _nvlink(sources: Sources) -> dict[str, Count]:
    """Errors of each GPU's NVLinks, added up over its links, by their kind."""
    totals: dict[str, int] = {}
    gpu = ""
    for line in sources.answer("nvidia-smi", "nvlink", "-e").splitlines():
        if device := re.match(r"GPU (\d+):", line):
            gpu = device[1]
        elif error := re.match(r"\s+Link \d+: ([\w ]+ Errors): (\d+)\s*$", line):
            name = f"nvlink/{gpu}/{error[1].lower().replace(' ', '_')}"
            totals[name] = totals.get(name, 0) + int(error[2])
    return {name: Count(value=value) for name, value in totals.items()}


def _gpu_clocks(sources: Sources) -> dict[str, float]:
    states: dict[str, float] = {}
    for index, mask in re.findall(r"^(\d+), (0x[0-9a-fA-F]+)\s*$", sources.answer(*_GPU_QUERY), re.MULTILINE):
        states |= {f"gpu/{index}/{reason}": float(bool(int(mask, 16) & bit)) for bit, reason in _GPU_REASONS.items()}
    return states
