"""Folds the lines of many ranks: the same line from each becomes one, with the ranks that say it in front.

Pure: the time comes with each call. Every rank's lines keep their order, and lines stand in the order in which they were
first said.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

_MOST_WAITING, _MOST_WAITING_CHARS = 20_000, 8_000_000
"""Lines, and their characters, that are kept to be folded. When there are more, the oldest are written early."""
_MOST_RANGES = 8
"""Ranges of ranks in front of a line; of more, the first ones and the number of ranks are told."""

_NUMBER_OF_RANK = re.compile(r"(\brank[ =:#_-]{0,2})(\d{1,7})\b", re.IGNORECASE)
# How libraries of C++ begin a line: "[W731 12:00:00.123456789 name.cpp:1]", "W0731 12:00:00.123456 4711 name.cpp:1]".
_STAMP = re.compile(r"^(\[?[IWEF]\d{3,4}) \d\d:\d\d:\d\d(?:\.\d+)?(?: +\d+)?")


@dataclass(eq=False, slots=True)
class _Waiting:
    """A line that is not written yet."""

    number: int
    """In the order of arrival."""
    due: float
    text: str
    named: str
    """The text with the first speaker's own number replaced by N."""
    key: str
    ranks: int = 0
    """The bit of each rank that says it."""
    named_alike: bool = True
    """Whether who says the same but for its own number may still join."""
    same_text: bool = True
    """Whether all have said the same to the letter, and who does so may still join."""


class Folder:
    """Takes lines of ranks 0 to `num_ranks` - 1, and gives each one to `write`, at the latest `window_s` after it came and
    somebody has called `flush`. A line that all ranks have said does not wait."""

    def __init__(self, write: Callable[[str], None], *, num_ranks: int, window_s: float = 0.3) -> None:
        self._write = write
        self._all = (1 << num_ranks) - 1
        self._window_s = window_s
        self._waiting: deque[_Waiting] = deque()
        self._by_text: dict[str, list[_Waiting]] = {}
        self._by_key: dict[str, list[_Waiting]] = {}
        self._last: dict[int, int] = {}
        """Of each rank: the number of the line that it was last part of. Its next one must come later."""
        self._numbers = itertools.count()
        self._chars = 0

    def add(self, rank: int, text: str, now: float) -> None:
        """Takes a line (without its end) that came at `now`, in seconds by any clock that never goes back."""
        if self._all == 1:
            self._write(text)
            return
        named = _NUMBER_OF_RANK.sub(lambda found: f"{found[1]}N" if int(found[2]) == rank else found[0], text)
        key = _STAMP.sub(r"\1", named)
        last = self._last.get(rank, -1)
        found = _after(last, self._by_text.get(text)) or _after(last, self._by_key.get(key))
        if found is None:
            found = _Waiting(next(self._numbers), now + self._window_s, text, named, key)
            self._waiting.append(found)
            self._by_text.setdefault(text, []).append(found)
            self._by_key.setdefault(key, []).append(found)
            self._chars += len(text)
        # A line is either about somebody, whom all name, or about each one itself. Which, the second speaker shows.
        elif text != found.text:
            self._close_to_same_text(found)
        elif key != found.key:
            self._close_to_named_alike(found)
        found.ranks |= 1 << rank
        self._last[rank] = found.number
        while self._waiting and self._is_due(self._waiting[0], now):
            self._write_first()

    def flush(self, now: float) -> None:
        """Writes the lines that have waited long enough."""
        while self._waiting and self._waiting[0].due <= now:
            self._write_first()

    def close(self) -> None:
        """Writes the lines that still wait."""
        while self._waiting:
            self._write_first()

    def _is_due(self, line: _Waiting, now: float) -> bool:
        full = len(self._waiting) > _MOST_WAITING or self._chars > _MOST_WAITING_CHARS
        return line.ranks == self._all or line.due <= now or full

    def _write_first(self) -> None:
        line = self._waiting.popleft()
        self._chars -= len(line.text)
        self._write(f"[{ranges(line.ranks)}] {line.text if line.same_text else line.named}")
        self._close_to_same_text(line)
        self._close_to_named_alike(line)

    def _close_to_same_text(self, line: _Waiting) -> None:
        if line.same_text:
            line.same_text = False
            _drop(self._by_text, line.text, line)

    def _close_to_named_alike(self, line: _Waiting) -> None:
        if line.named_alike:
            line.named_alike = False
            _drop(self._by_key, line.key, line)


def _after(number: int, lines: list[_Waiting] | None) -> _Waiting | None:
    """The first of `lines` that came after `number`: a rank's lines keep their order, and two equal ones are two."""
    if not lines or lines[-1].number <= number:
        return None
    return lines[bisect.bisect_right(lines, number, key=attrgetter("number"))]


def _drop(lines: dict[str, list[_Waiting]], text: str, line: _Waiting) -> None:
    same = lines[text]
    same.remove(line)
    if not same:
        del lines[text]


def ranges(ranks: int) -> str:
    """The ranks whose bits are set, as "0-3,7"; of very many ranges only the first, and how many ranks there are."""
    bits = f"{ranks:b}"[::-1]
    found = [(match.start(), match.end() - 1) for match in re.finditer("1+", bits)]
    shown = ",".join(f"{first}-{last}" if last > first else str(first) for first, last in found[:_MOST_RANGES])
    return shown if len(found) <= _MOST_RANGES else f"{shown},... {ranks.bit_count()} ranks"
