"""Files that list hosts, as Open MPI, MPICH and site scripts write them.

# a comment
n0 slots=4              one host with its slots, as Open MPI has it
n1:4                    the same, as MPICH has it
n[2-3,7]                several hosts, as SLURM writes them
n4                      again for each slot, as `srun hostname` prints them
n4
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import ConfigError

_SLOTS = re.compile(r"(?:max[-_])?slots=(\d+)")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._,:-]|\[[0-9,-]+\])*")
_EXPECTED = "a line has the form `n0`, `n0 slots=4`, `n0:4` or `n[0-3] slots=4`"


@dataclass(frozen=True, kw_only=True)
class ListedHost:
    """One host of a hostfile."""

    name: str
    slots: int | None
    """Ranks that it may run; where the configuration does not say, that it runs. None: the file does not say."""


def read_hostfile(path: Path) -> tuple[ListedHost, ...]:
    """The hosts that the file at `path` lists, in its order, each once.

    Raises ConfigError where it cannot be read, lists none, or holds something else; all bad lines are named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the list of hosts cannot be read: {error}") from error
    slots: dict[str, int | None] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        try:
            listed = _parse_line(content)
        except ValueError as error:
            problems.append(f"{path}:{number}: {content}: {error}")
            continue
        for host in listed:
            # Without slots a line is one slot: a host that is listed four times has four.
            both = (slots[host.name] or 1) + (host.slots or 1) if host.name in slots else host.slots
            slots[host.name] = both
    if problems:
        raise ConfigError("\n".join(problems), tuple(problems))
    if not slots:
        raise ConfigError(f"{path}: lists no host: {_EXPECTED}")
    return tuple(ListedHost(name=name, slots=number) for name, number in slots.items())


def _parse_line(content: str) -> list[ListedHost]:
    """Raises ValueError, which says what is wrong."""
    import hostlist

    name, *settings = content.split()
    slots = None
    for setting in settings:
        match = _SLOTS.fullmatch(setting)
        if match is None:
            raise ValueError(f"{setting!r} is not known here; {_EXPECTED}")
        if setting.startswith("slots"):
            slots = int(match[1])
    if name.count(":") == 1 and name.rpartition(":")[2].isdecimal():  # more colons are an address of IPv6
        name, _, count = name.partition(":")
        slots = int(count)
    if slots == 0:
        raise ValueError("a host without a slot takes no part: leave it out")
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} is not the name of a host; {_EXPECTED}")
    try:
        names: list[str] = hostlist.expand_hostlist(name)
    except hostlist.BadHostlist as error:
        raise ValueError(f"{name!r} is not a range of hosts ({error}); {_EXPECTED}") from None
    return [ListedHost(name=each, slots=slots) for each in names]
