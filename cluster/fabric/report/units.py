"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One unit for many numbers of a table or an axis."""

    name: str
    factor: float
    """What a number is multiplied by to be in this unit."""

    def show(self, number: float) -> str:
        """Three significant figures at least, without the unit's name."""
        return figure(number * self.factor)


def figure(number: float) -> str:
    """`0.0123`, `1.23`, `12.3`, `123`, `12,345`."""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    decimals = min(max(2 - math.floor(math.log10(abs(number))), 0), 6)
    return f"{number:,.{decimals}f}"


def bit_rates(bytes_per_s: Iterable[float]) -> Unit:
    """A unit of bits a second in which the typical one of these rates has one to three digits before the point."""
    return _prefixed("bit/s", [8 * rate for rate in bytes_per_s], 8.0)


def byte_rates(bytes_per_s: Iterable[float]) -> Unit:
    """The same in bytes, as nccl-tests show bandwidths."""
    return _prefixed("B/s", list(bytes_per_s), 1.0)


def seconds(number: float) -> str:
    """`3.2 µs`, `14.8 ms`, `2.5 s`."""
    for limit, factor, name in ((1e-6, 1e9, "ns"), (1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if abs(number) < limit:
            return f"{figure(number * factor)} {name}" if number else "0 s"
    return f"{figure(number)} s"


def size(num_bytes: float) -> str:
    """`512 B`, `16 KiB`, `1 MiB`, `1.5 GiB`."""
    for factor, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {name}"
    return f"{num_bytes:.0f} B"


def percent(share: float, *, signed: bool = False) -> str:
    """`68 %`, `+68 %`, `0.4 %`."""
    return f"{100 * share:{'+' if signed else ''}.{0 if abs(share) >= 0.0995 else 1}f} %"


def _prefixed(name: str, rates: list[float], factor: float) -> Unit:
    known = sorted(rate for rate in rates if math.isfinite(rate) and rate > 0)
    typical = known[len(known) // 2] if known else 1.0
    for limit, prefix in _PREFIXES:
        if typical >= limit:
            return Unit(name=f"{prefix}{name}", factor=factor / limit)
    return Unit(name=name, factor=factor)


def time_unit(times_s: Iterable[float]) -> Unit:
    """A unit in which the greatest of these times has one to three digits before the point."""
    greatest = max((time for time in times_s if math.isfinite(time)), default=1.0)
    for limit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if greatest >= limit:
            return Unit(name=name, factor=1 / limit)
    return Unit(name="ns", factor=1e9)
