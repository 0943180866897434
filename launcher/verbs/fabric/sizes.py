"""Sizes and lists as they stand on a command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar, cast

from launcher.errors import ConfigError

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}

Name = TypeVar("Name", bound=str)


def parse_sizes(text: str) -> tuple[int, ...]:
    """Bytes of `1K:64M` (each twice the one before), `1K:64M:4` (four times) or `1K,64K,1M`, K being 1,024.

    Raises ConfigError where it is neither.
    """
    if ":" not in text:
        return tuple(dict.fromkeys(_size(part, text) for part in text.split(",")))
    first, last, *step = text.split(":")
    factor = int(step[0]) if step and step[0].isdecimal() else 2
    low, high = _size(first, text), _size(last, text)
    if len(step) > 1 or (step and not step[0].isdecimal()) or factor < 2 or high < low:
        raise ConfigError(f"--sizes {text}: give FIRST:LAST or FIRST:LAST:FACTOR, FIRST <= LAST and FACTOR >= 2")
    sizes = [low]
    while sizes[-1] * factor <= high:
        sizes.append(sizes[-1] * factor)
    return tuple(sizes)


def parse_names(option: str, text: str, known: Sequence[Name]) -> tuple[Name, ...]:
    """Names separated by commas, each one of `known`. Raises ConfigError for another."""
    names = [part.strip() for part in text.split(",")]
    if wrong := [name for name in names if name not in known]:
        raise ConfigError(f"{option} {text}: {wrong[0]!r} is none of {', '.join(known)}")
    return tuple(dict.fromkeys(cast(list[Name], names)))


def words(num_bytes: float) -> str:
    """A size or a rate for people: `64 MiB`, `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:.3g} {unit}" if num_bytes < 1000 else f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    raise AssertionError


def _size(part: str, text: str) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*([kmg]?)(?:i?b)?\s*", part.lower())
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"--sizes {text}: {part!r} is no size such as 512, 64K or 16M")
    return int(match[1]) * _UNITS[match[2]]
