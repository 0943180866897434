"""Files of JSON objects, one a line, that grow while others read them and whose writer may be killed in the middle of a line.

Readers pass over what is no whole object. Imports without torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 1 << 16


def append_line(path: Path, record: dict[str, Any]) -> None:
    """One object more, in a line of its own; makes the file and its folder where there are none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        # A killed process may have left half a line, which the next one must not be glued to.
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in order; none where there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if (record := _object(line)) is not None:
                yield record


def read_backwards(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The objects from the last to the first, each with where its line ends in the file, in bytes; none where there is no
    file. No more of the file is read than is asked for.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        start = size = file.seek(0, os.SEEK_END)
        rest = b""  # the end of a line that begins before `start`
        while start > 0:
            length = min(_BLOCK_BYTES, start)
            start -= length
            file.seek(start)
            block = file.read(length) + rest
            end = start + len(block)
            rest, *lines = block.split(b"\n")
            for line in reversed(lines):
                if (record := _object(line)) is not None:
                    yield record, min(end + 1, size)
                end -= len(line) + 1
        if (record := _object(rest)) is not None:
            yield record, min(len(rest) + 1, size)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode())
    except ValueError:  # half a line, or no text at all
        return None
    return record if isinstance(record, dict) else None
