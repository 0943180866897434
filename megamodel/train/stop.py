"""Stopping on a signal: the handler only takes note; the loop saves at the end of the step and ends."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

# Ctrl-C; a scheduler's end; a scheduler's warning before its end (SLURM's --signal).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_ASKED = "This rank had been asked to stop before."


def was_asked_to_stop(error: BaseException) -> bool:
    """Whether a `StopRequest` had noted a signal when `error` ended its `with`: another rank may then have ended for it."""
    return _ASKED in getattr(error, "__notes__", ())


class StopRequest:
    """In a `with`: notes the first of STOP_SIGNALS. Later ones change nothing, since a scheduler's warning is followed by its
    SIGTERM while the save is under way; but a second Ctrl-C kills the process at once (130 in a shell), saved or not.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal_name is not None

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # After a failure nothing may be saved: the handlers from before, which end in good order, would be wrong.
            signal.signal(number, handler if error is None else signal.SIG_DFL)
        self._previous = {}
        if error is not None and self.requested:
            error.add_note(_ASKED)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
        if number == signal.SIGINT:
            # The system's own action, since it also ends a process that hangs where no handler of Python's is reached.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
