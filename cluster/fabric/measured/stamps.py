"""Time stamps of transfers and collectives on a CPU or a CUDA device, with a deadline on whatever is waited for."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any, Protocol

import torch

from cluster.fabric.measured.transport import TransportStalledError

_POLL_S = 100e-6


class Work(Protocol):
    """torch.distributed's handle of an operation under way."""

    def wait(self, timeout: timedelta = ...) -> bool:
        """Raises RuntimeError where it failed or its time is up."""
        ...


class Stamps:
    """Stamps of one sequence of operations. `wait` for one, then `stamp`; `seconds` at the end."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        # Operations of one sequence do not queue behind those of another.
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._stamps: list[Any] = []

    def wait(self, work: Work, deadline: float) -> None:
        """Until `work` is through (on a CUDA device: makes this sequence's stream wait). Raises TransportStalledError."""
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TransportStalledError("its time was up")
        try:
            if self._stream is None:
                work.wait(timedelta(seconds=remaining))
            else:
                with torch.cuda.stream(self._stream):
                    work.wait()
        except RuntimeError as error:  # torch's network errors are RuntimeErrors
            raise TransportStalledError(str(error).strip().splitlines()[0]) from error

    def stamp(self) -> None:
        """Now: after all that was waited for."""
        if self._stream is None:
            self._stamps.append(time.perf_counter())
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record(self._stream)
            self._stamps.append(event)

    def seconds(self, deadline: float) -> list[float]:
        """Each stamp, in seconds since the first. Raises TransportStalledError where a device does not get there in time."""
        if not self._cuda:
            return [stamp - self._stamps[0] for stamp in self._stamps]
        while self._stamps and not self._stamps[-1].query():
            if time.monotonic() > deadline:
                raise TransportStalledError("its time was up")
            time.sleep(_POLL_S)
        return [self._stamps[0].elapsed_time(stamp) / 1e3 for stamp in self._stamps]
