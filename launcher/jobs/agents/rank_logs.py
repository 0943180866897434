"""What ranks print: cut into lines, kept until the head takes them, and written to files that have a limit."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from launcher.output import visible

LONGEST_LINE = 4000
"""Bytes of a line that are told to the head; the rank's own log has all of it."""
_LINE_END = re.compile(rb"([\r\n])")
_TAIL_BYTES = 1 << 16
"""Of a log that is full, so much of its end is kept: there stands why a rank has failed."""
_STYLES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
"""What colours text, or steers a terminal in other ways."""


def as_text(line: bytes) -> str:
    """A line as a person may read it: without colours, and with a dot for what is no text."""
    text = line.decode(errors="replace")
    return text if text.isprintable() else visible(_STYLES.sub("", text))


class LineSplitter:
    """Cuts a rank's output into lines. A carriage return ends one too, as progress bars have it; very long ones are cut."""

    def __init__(self) -> None:
        self._rest = b""
        self._is_cut = False
        """Whether what comes up to the next line end belongs to a line that has been told as far as it may be."""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are complete now."""
        data = self._rest + data
        held = b"\r" if data.endswith(b"\r") else b""  # half of a line end, perhaps
        *ended, last = _LINE_END.split(data[: len(data) - len(held)].replace(b"\r\n", b"\n"))
        lines = []
        for line, end in zip(ended[::2], ended[1::2]):
            if not self._is_cut and (line or end == b"\n"):
                lines.append(_cut(line))
            self._is_cut = False
        if len(last) > LONGEST_LINE and not self._is_cut:
            lines.append(_cut(last))
            self._is_cut = True
        self._rest = (b"" if self._is_cut else last) + held
        return lines

    def end(self) -> list[bytes]:
        """The last line, where it has no end."""
        rest, self._rest = self._rest.rstrip(b"\r"), b""
        return [rest] if rest else []


def _cut(line: bytes) -> bytes:
    return line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + b" ... (cut)"


class LineQueue:
    """Lines on their way to the head. When it is full, new ones are counted instead, and the number is told in their place."""

    def __init__(self, *, most_lines: int = 10_000, most_bytes: int = 2_000_000) -> None:
        self._most_lines = most_lines
        self._most_bytes = most_bytes
        self._lines: deque[tuple[int, bytes]] = deque()
        self._bytes = 0
        self._dropped: Counter[int] = Counter()

    def __bool__(self) -> bool:
        return bool(self._lines or self._dropped)

    def add(self, rank: int, line: bytes) -> None:
        """Keeps a line, if there is room."""
        if len(self._lines) >= self._most_lines or self._bytes >= self._most_bytes:
            self._dropped[rank] += 1
            return
        if rank in self._dropped:
            self._tell_dropped(rank)
        self._put(rank, line)

    def take(self, most: int) -> list[tuple[int, str]]:
        """The oldest lines, at most `most` of them, with their ranks."""
        taken: list[tuple[int, str]] = []
        while len(taken) < most:
            if not self._lines:
                if not self._dropped:
                    break
                self._tell_dropped(next(iter(self._dropped)))
            rank, line = self._lines.popleft()
            self._bytes -= len(line)
            taken.append((rank, as_text(line)))
        return taken

    def _tell_dropped(self, rank: int) -> None:
        number = self._dropped.pop(rank)
        self._put(rank, f"(mega: {number:,} lines are left out here; rank-{rank}.log has them)".encode())

    def _put(self, rank: int, line: bytes) -> None:
        self._lines.append((rank, line))
        self._bytes += len(line)


class CappedLog:
    """A file that takes so many bytes, then only counts, and at its end gets the last few of what was left out."""

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        self.path = path
        self._room = self._max_bytes = max_bytes
        self._left_out = 0
        self._tail = b""
        self._file: BinaryIO | None = None

    def write(self, data: bytes) -> None:
        """Appends. Raises OSError where that cannot be; the data are lost then."""
        fits, rest = data[: self._room], data[self._room :]
        self._room -= len(fits)
        self._append(fits)
        if rest:
            first, self._left_out = self._left_out == 0, self._left_out + len(rest)
            self._tail = (self._tail + rest)[-_TAIL_BYTES:]
            if first:
                self._append(
                    f"\n(mega: this log is full, {self._max_bytes:,} bytes (launch.max_rank_log_mb); "
                    "only the last lines will follow)\n".encode()
                )

    def close(self) -> None:
        """Adds the end of what was left out. Raises OSError as `write` does."""
        try:
            if self._left_out:
                lost = self._left_out - len(self._tail)
                self._append(f"(mega: {lost:,} bytes are left out here)\n".encode() + self._tail)
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _append(self, data: bytes) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        while data:
            data = data[self._file.write(data) :]


class LogWriter:
    """Writes logs in a thread of its own, so that a slow disk holds up nobody else.

    `say` hears, in that thread, once of each log that cannot be written; all else goes on.
    """

    def __init__(self, say: Callable[[str], None], *, most_bytes: int = 64_000_000) -> None:
        self._say = say
        self._most_bytes = most_bytes
        self._tasks: deque[tuple[CappedLog, bytes | None]] = deque()
        self._waiting_bytes = 0
        self._dropped: Counter[CappedLog] = Counter()
        self._failed: set[CappedLog] = set()
        self._changed = threading.Condition()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
        self._thread.start()

    def write(self, log: CappedLog, data: bytes) -> None:
        """Has `data` appended. Where the disk is far behind they are dropped, and the log says so."""
        with self._changed:
            if self._waiting_bytes + len(data) > self._most_bytes:
                self._dropped[log] += len(data)
                return
            self._put(log, data)

    def close(self, log: CappedLog) -> None:
        """Has the log closed."""
        with self._changed:
            self._put(log, None)

    def end(self, timeout_s: float) -> None:
        """Waits until all is written, but no longer than `timeout_s`."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _put(self, log: CappedLog, data: bytes | None) -> None:
        if number := self._dropped.pop(log, 0):
            note = f"\n(mega: {number:,} bytes are left out here: this file system is too slow)\n".encode()
            self._tasks.append((log, note))
            self._waiting_bytes += len(note)
        self._tasks.append((log, data))
        self._waiting_bytes += len(data or b"")
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._ending)
                if not self._tasks:
                    return
                log, data = self._tasks.popleft()
                self._waiting_bytes -= len(data or b"")
            try:
                if data is None:
                    log.close()
                else:
                    log.write(data)
            except OSError as error:
                if log not in self._failed:
                    self._failed.add(log)
                    with contextlib.suppress(OSError):
                        self._say(f"{log.path}: cannot be written ({error.strerror}); the run goes on without it")
