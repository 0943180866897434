"""Figures as sentences say them."""

from __future__ import annotations

from collections.abc import Sequence

_DURATIONS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
_RATES = ((1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s"))


def durations(seconds: Sequence[float]) -> tuple[tuple[str, ...], str]:
    """Each with three digits, all in the one unit that suits the greatest; and that unit."""
    return _scaled(seconds, _DURATIONS)


def rates(bytes_per_s: Sequence[float]) -> tuple[tuple[str, ...], str]:
    """The same of bytes a second."""
    return _scaled(bytes_per_s, _RATES)


def duration(seconds: float) -> str:
    """One, with its unit: `3.1 ms`."""
    (figure,), unit = durations([seconds])
    return f"{figure} {unit}"


def rate(bytes_per_s: float) -> str:
    """One, with its unit: `47.1 MB/s`."""
    (figure,), unit = rates([bytes_per_s])
    return f"{figure} {unit}"


def _scaled(values: Sequence[float], units: Sequence[tuple[float, str]]) -> tuple[tuple[str, ...], str]:
    most = max(map(abs, values))
    scale, unit = next((each for each in units if most >= each[0]), units[-1])
    return tuple(_three_digits(value / scale) for value in values), unit


def _three_digits(value: float) -> str:
    decimals = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{decimals}f}"
