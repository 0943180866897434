"""Where the main thread of this process is, and whether it stands there for other ranks."""

from __future__ import annotations

import linecache
import sys
import threading
from dataclasses import dataclass
from pathlib import PurePath
from types import FrameType

_SHOWN_FRAMES = 3
_COMMUNICATION_FILES = (
    "torch/distributed/distributed_c10d.py",
    "torch/distributed/c10d_logger.py",
    "torch/distributed/_functional_collectives.py",
)
_LIBRARY_PARTS = frozenset({"torch", "site-packages", "dist-packages"})


@dataclass(frozen=True, kw_only=True)
class Position:
    """A moment of the main thread."""

    lines: tuple[str, ...]
    """"file.py:12 function: source", the innermost first; functions of libraries stand aside for the run's own."""
    waits: bool
    """It stands in a call of torch.distributed, or in the `wait()` of such a call."""
    mark: int
    """Changes when the thread moves on."""


def main_thread_position() -> Position:
    """Of the main thread, now. A thread that runs without pause is found where it last let others run."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return Position(lines=(), waits=False, mark=0)
    frames: list[FrameType] = []
    inner: FrameType | None = frame
    while inner is not None:
        frames.append(inner)
        inner = inner.f_back
    own = [each for each in frames if not _is_library(each.f_code.co_filename)]
    return Position(
        lines=tuple(_line(each) for each in (own or frames)[:_SHOWN_FRAMES]),
        waits=_stands_for_others(frame),
        mark=hash(tuple((id(each), each.f_lasti) for each in frames)),
    )


def _is_library(file: str) -> bool:
    return file.startswith("<") or not _LIBRARY_PARTS.isdisjoint(PurePath(file).parts)


def _line(frame: FrameType) -> str:
    code = frame.f_code
    source = linecache.getline(code.co_filename, frame.f_lineno).strip()
    return f"{code.co_filename}:{frame.f_lineno} {code.co_qualname}: {source}"


def _stands_for_others(frame: FrameType) -> bool:
    """Native code leaves no frame: it is known by the Python that called it."""
    if frame.f_code.co_filename.endswith(_COMMUNICATION_FILES):
        return True
    called = _called(frame)
    return called.endswith(".wait()") or "wait_tensor(" in called


def _called(frame: FrameType) -> str:
    """The source of the expression that the frame is at, as far as it stands on one line."""
    positions = list(frame.f_code.co_positions())
    index = frame.f_lasti // 2
    if not 0 <= index < len(positions):
        return ""
    first, last, start, stop = positions[index]
    if first is None or first != last or start is None or stop is None:
        return ""
    line = linecache.getline(frame.f_code.co_filename, first)
    return line.encode()[start:stop].decode(errors="replace")
