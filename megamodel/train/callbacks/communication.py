"""What a traced step has sent, as a person reads it."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from megamodel.train.callbacks.base import Callback

_VERDICT = {
    True: "as the formulas say",
    False: "NOT as the formulas say",
    None: "for this engine there are no formulas",
}


class CommunicationTable(Callback):
    """A line for each kind of communication: axis, kind, type, count and bytes of a rank; below it what it should be."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def on_event(self, event: str, **details: object) -> None:
        """Of the event "communication" alone."""
        if event != "communication":
            return
        rows: Any = details["rows"]
        self._say(f"step {details['step']} · communication of a rank: {_VERDICT[details['agrees']]}")  # type: ignore[index]
        for line in _aligned([_cells(row) for row in rows]):
            self._say(line)
        if details["agrees"] is not None:
            self._say("  (bytes are payload; symbols: docs/communication.md)")

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _cells(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The line of a row, and the lines below it."""
    count, size = _range(row["count"]), _range(row["bytes"])
    line = [row["axis"], row["kind"], row["dtype"], f"{count} x", f"{size} bytes"]
    below = list(row["formula"])
    if row["agrees"] is False:
        line.append(f"EXPECTED {_range(row['expected_count'])} x, {_range(row['expected_bytes'])} bytes")
        below = below or ["no formula knows this communication"]
    return line, below


def _aligned(rows: list[tuple[list[str], list[str]]]) -> list[str]:
    widths = [max((len(line[column]) for line, _ in rows), default=0) for column in range(5)]
    lines = []
    for line, below in rows:
        left = [cell.ljust(width) for cell, width in zip(line[:3], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(line[3:5], widths[3:], strict=True)]
        lines.append("  " + "  ".join([*left, *right, *line[5:]]))
        lines += [f"      {text}" for text in below]
    return lines


def _range(spread: dict[str, int]) -> str:
    """One number where all ranks have the same."""
    least, most = spread["least"], spread["most"]
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
