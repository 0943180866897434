"""The pair matrix as text."""

from __future__ import annotations

from collections.abc import Sequence

Matrix = Sequence[Sequence[float | None]]


def heat_map(matrix: Matrix, names: Sequence[str]) -> str:
    """Lines of text: a row sends to a column, the darker the slower against the median of all pairs.

    matrix: (n, n) bytes a second; None or NaN where nothing was measured.
    names: (n,) of the hosts.
    """
    return ""
