"""Stop signals to a supervisor: heard at any time, whatever it waits for."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from types import TracebackType
from typing import Self

from launcher.rank_process import stop_signals


class StopAsked:
    """In a `with` within a running event loop of the main thread: notes the first stop signal, and a second Ctrl-C.

    What other signals follow the first changes nothing: a scheduler's warning is followed by its SIGTERM while ranks save.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()
        """A second Ctrl-C: without saving."""
        self.signal: signal.Signals | None = None
        """The first."""
        self._say = say
        self._signals = stop_signals()

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in self._signals:
            loop.add_signal_handler(number, self._note, number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        loop = asyncio.get_running_loop()
        for number in self._signals:
            loop.remove_signal_handler(number)

    async def sleep(self, seconds: float) -> bool:
        """Waits; returns early, with True, once a stop is asked."""
        try:
            await asyncio.wait_for(self.asked.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _note(self, number: signal.Signals) -> None:
        if self.signal is None:
            self.signal = number
            if number == signal.SIGINT:
                self._say("Stopping after this step and saving; Ctrl-C again ends at once.")
            self.asked.set()
        elif number == signal.SIGINT and self.signal == signal.SIGINT and not self.at_once.is_set():
            self._say("Ending at once. The last complete checkpoint stays.")
            self.at_once.set()
