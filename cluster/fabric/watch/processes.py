"""What the kernel tells of the processes of a rank: whether they live, are stopped, and do anything."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_STATE, _PARENT, _USER_TICKS, _SYSTEM_TICKS, _START_TICKS = 0, 1, 11, 12, 19  # fields of stat, after the name
_WORKING_SHARE = 0.05
"""Of one core. A rank that waits uses far less, one that works on a crowded machine more."""
_WORKING_SWITCHES_PER_S = 20.0
"""A main thread that gives up its core so often is being fed, as by a network, even where it uses no time."""
_WORKING_BYTES_PER_S = 100_000.0
_STARVED_SHARE = 0.2
"""Of one core, for a main thread that is ready to run."""
_TICKS_PER_S = 100.0
"""USER_HZ, the unit of the kernel's times on every Linux that there is."""


@dataclass(frozen=True, kw_only=True)
class ProcessId:
    """One process for ever: the kernel gives its number to another one some day, but not with the same start."""

    pid: int
    start_ticks: int


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a rank's process and all that came of it have used so far."""

    cpu_s: float
    io_bytes: int
    switches: int
    """Times that the main thread has given up its core by itself."""
    stopped: bool
    is_runnable: bool
    """The main thread runs, or would if the machine were less crowded."""
    in_disk_wait: bool
    """The main thread waits for a disk or a network file system."""


def identify(pid: int) -> ProcessId | None:
    """The process that has this number now."""
    fields = _stat(pid)
    return ProcessId(pid=pid, start_ticks=int(fields[_START_TICKS])) if fields else None


def this_process() -> ProcessId:
    """The one that asks."""
    own = identify(os.getpid())
    assert own is not None, "Linux has no /proc here"
    return own


def lives(process: ProcessId) -> bool:
    """Whether it is still there; one that has ended but nobody asked after is not."""
    fields = _stat(process.pid)
    return bool(fields) and int(fields[_START_TICKS]) == process.start_ticks and fields[_STATE] not in "ZX"


def usages(processes: list[ProcessId]) -> dict[ProcessId, Usage]:
    """Of those that live, with all their descendants, from one look at the machine."""
    stats = {pid: fields for pid in _pids() if (fields := _stat(pid))}
    children: dict[int, list[int]] = defaultdict(list)
    for pid, fields in stats.items():
        children[int(fields[_PARENT])].append(pid)
    found = {}
    for process in processes:
        fields = stats.get(process.pid, [])
        if fields and int(fields[_START_TICKS]) == process.start_ticks:
            family = _family(process.pid, children)
            ticks = sum(int(stats[pid][_USER_TICKS]) + int(stats[pid][_SYSTEM_TICKS]) for pid in family)
            found[process] = Usage(
                cpu_s=ticks / _TICKS_PER_S,
                io_bytes=sum(_io_bytes(pid) for pid in family),
                switches=_switches(process.pid),
                stopped=fields[_STATE] in "Tt",
                is_runnable=fields[_STATE] == "R",
                in_disk_wait=fields[_STATE] == "D",
            )
    return found


def is_working(before: Usage, after: Usage, seconds: float) -> bool:
    """Whether a rank did anything in the `seconds` between two looks."""
    return (
        after.is_runnable
        or after.in_disk_wait
        or after.cpu_s - before.cpu_s > _WORKING_SHARE * seconds
        or after.io_bytes - before.io_bytes > _WORKING_BYTES_PER_S * seconds
        or after.switches - before.switches > _WORKING_SWITCHES_PER_S * seconds
    )


def is_starved(before: Usage, after: Usage, seconds: float) -> bool:
    """Whether a rank would run if the machine let it: it is no wonder then that it says nothing."""
    return after.is_runnable and after.cpu_s - before.cpu_s < _STARVED_SHARE * seconds


def _family(pid: int, children: dict[int, list[int]]) -> list[int]:
    family = [pid]
    for member in family:  # grows while it is walked
        family += children[member]
    return family


def _pids() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdecimal()]


def _stat(pid: int) -> list[str]:
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:  # gone, or somebody else's
        return []
    return text.rpartition(")")[2].split()  # a name may hold anything, brackets too


def _io_bytes(pid: int) -> int:
    fields = _fields(pid, "io")
    return sum(int(fields.get(name, 0)) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))


def _switches(pid: int) -> int:
    return int(_fields(pid, "status").get("voluntary_ctxt_switches", 0))


def _fields(pid: int, file: str) -> dict[str, str]:
    try:
        text = (_PROC / str(pid) / file).read_text()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
