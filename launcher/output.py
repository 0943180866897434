"""What a verb says: tables and lines for people, or one JSON object for programs."""

from __future__ import annotations

import json
import math
import os
import select
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO


def visible(text: str) -> str:
    """The text with each control character but line ends and tabs replaced by a middle dot."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "·" for letter in text)


class Output:
    """Where a verb's words go. With `as_json` standard output gets exactly one object, and all else goes to stderr.

    `people` is the stream for people, `err` the one for what went wrong.
    """

    def __init__(self, *, as_json: bool, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.as_json = as_json
        self._out = out or sys.stdout
        self.err = err or sys.stderr
        self.people = self.err if as_json else self._out
        self._has_result = False

    def say(self, text: str = "") -> None:
        """One or more lines for people. What would steer the terminal, as a young model's samples may, is shown as a dot."""
        self._write(self.people, visible(text))

    def warn(self, text: str) -> None:
        """A line about what went wrong or was changed; always on stderr."""
        self._write(self.err, text)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table for people: drawn on a terminal, aligned plain lines elsewhere."""
        if self.people.isatty():
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text

            table = Table(*columns)
            for row in rows:
                table.add_row(*map(Text, row))
            Console(file=self.people).print(table)
            return
        widths = [max(map(len, cells)) for cells in zip(columns, *rows)]
        for row in (columns, *rows):
            self.say("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())

    def progress(self, stage: str, fraction: float) -> None:
        """How far a stage has come, 0 to 1: one line that is redrawn on a terminal; elsewhere a line when it starts."""
        if self.err.isatty():
            self.err.write(f"\r\x1b[K{stage}: {fraction:.0%}" + ("\n" if fraction >= 1 else ""))
            self.err.flush()
        elif fraction <= 0:
            self._write(self.err, f"{stage} ...")

    def result(self, data: Mapping[str, Any]) -> None:
        """The verb's result; nothing without --json, since people have read it already. Only the first is told, since a
        program expects one object: what fails after it shows in the exit code and on stderr. NaN and infinity, which JSON
        does not have, become null.
        """
        if self.as_json and not self._has_result:
            self._has_result = True
            self._write(self._out, json.dumps(_without_nonfinite(data), default=str, allow_nan=False))

    def reader_has_left(self) -> bool:
        """Whether nobody reads what is written any more, as behind `| head`. What is left to write is dropped then."""
        left = [stream for stream in (self._out, self.err) if _nobody_reads(stream)]
        for stream in left:
            # Else the interpreter's own last flush fails too, and says so.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        return bool(left)

    def _write(self, stream: TextIO, text: str) -> None:
        stream.write(f"{text}\n")
        stream.flush()


def _nobody_reads(stream: TextIO) -> bool:
    try:
        number = stream.fileno()
    except OSError:  # it is kept in memory
        return False
    poll = select.poll()
    poll.register(number, 0)  # asks for nothing: an error is told anyway, and a pipe without a reader is one
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nonfinite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(inner) for inner in value]
    return value
