"""A fixed piece of single-threaded work, to compare how fast ranks compute. With CUDA it runs on the device."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CPU_SIDE = 192
"""Three matrices of 147 kB: they stay in a core's own cache, so that the work measures the core."""
_CUDA_SIDE = 4096
_CALIBRATION_S = 0.05


class Workpiece:
    """Matrix products of one size. A unit of work is one product."""

    def __init__(self, device: torch.device) -> None:
        side = _CUDA_SIDE if device.type == "cuda" else _CPU_SIDE
        self._device = device
        self._left_SS = torch.full((side, side), 1.0 / side, device=device)
        self._right_SS = torch.full((side, side), 0.5, device=device)
        self._out_SS = torch.empty(side, side, device=device)

    def unit_seconds(self) -> float:
        """Seconds of one unit where nothing disturbs it: the shortest of many."""
        with _one_thread():
            self._run(1)
            shortest = float("inf")
            end = time.monotonic() + _CALIBRATION_S
            while time.monotonic() < end:
                shortest = min(shortest, self._timed(2) / 2)
        return shortest

    def seconds(self, units: int) -> float:
        """Wall-clock seconds of `units`, one after another."""
        with _one_thread():
            self._run(1)
            return self._timed(units)

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Works in a thread of its own for as long as the block runs."""
        ended = threading.Event()

        def work() -> None:
            with _one_thread():
                while not ended.is_set():
                    self._run(4)

        thread = threading.Thread(target=work, name="fabric-compute", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _timed(self, units: int) -> float:
        begin = time.perf_counter()
        self._run(units)
        return time.perf_counter() - begin

    def _run(self, units: int) -> None:
        for _ in range(units):
            torch.mm(self._left_SS, self._right_SS, out=self._out_SS)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Several threads would wait for one another, and measure the scheduler."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
