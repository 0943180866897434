"""The run under watch: who hangs, who is slow, which group's network is. Every rank has a part of it.

What is found is written by the watch itself, to events.jsonl and `fabric/`; here it is only shown.
"""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from cluster.errors import FabricError
from cluster.fabric.monitor import flight_durations
from cluster.fabric.monitor.expected import ExpectedStep, read_profile
from cluster.fabric.monitor.head_analyser import WINDOWS_FILE, analyser_spec
from cluster.fabric.monitor.rank_messages import EXPECTED, OFF
from cluster.fabric.monitor.rank_monitor import RankMonitor
from cluster.fabric.monitor.tap import CollectiveTap
from cluster.fabric.predict import CommunicationRow
from cluster.fabric.watch.flight import axis_name, group_members
from cluster.fabric.watch.rank_side import Watch, start_watch
from cluster.fabric.watch.setup import WatchSetup
from cluster.fabric.watch.status import FINDINGS_FILE, FOLDER
from megamodel.train.batch import TokenBatch
from megamodel.train.build import BuiltModel
from megamodel.train.callbacks.base import Callback, RunFacts, StepRecord
from megamodel.train.communication import Expected
from megamodel.train.job import TrainingJob
from megamodel.train.step import Step, StepResult
from parallel.world import World

_LOOK_SECONDS = 1.0
_logger = logging.getLogger(__name__)

Scalars = Callable[[Mapping[str, float], int], None]
T = TypeVar("T")


def watch_run(
    job: TrainingJob, world: World, *, console: Console, scalars: Sequence[Scalars] = ()
) -> FabricMonitor | None:
    """Starts the watch of a run, or returns None where `fabric.monitor` says that it has none. A collective.

    `scalars` take the figures of each window, on rank 0. Where the watch cannot be had, the run goes on without, and rank 0
    says why on `console`.
    """
    if not job.fabric.watches(world.world_size) or world.backend is None:
        return None
    setup = WatchSetup(
        directory=Path(job.run_directory),
        rank=world.rank,
        world_size=world.world_size,
        local_rank=world.local_rank,
        host=socket.gethostname(),
        address=world.address or socket.gethostname(),
        exchange=world.broadcast_object,
        hang_seconds=job.fabric.hang_seconds,
        analysers=(analyser_spec(window_steps=job.fabric.window_steps, prometheus_port=job.fabric.prometheus_port),),
    )
    try:
        watch = start_watch(setup)
    except Exception as error:  # whatever it is: a run needs no watch
        console.print(f"this run is not watched: {_words(error)}", highlight=False, markup=False, soft_wrap=True)
        return None
    return FabricMonitor(job, world, watch, console=console, scalars=scalars)


class FabricMonitor(Callback):
    """One rank's part of a watched run: times collectives in some of its steps; on rank 0 shows what the watch found.

    None of its methods raises. A part that fails is told once, and left out from then on; hangs are still seen.
    """

    def __init__(
        self, job: TrainingJob, world: World, watch: Watch, *, console: Console, scalars: Sequence[Scalars] = ()
    ) -> None:
        self._job = job
        self._world = world
        self._watch = watch
        self._console = console
        self._scalars = scalars
        self._monitor: RankMonitor | None = None
        folder = Path(job.run_directory) / FOLDER
        self._windows = _Tail(folder / WINDOWS_FILE)
        self._findings = _Tail(folder / FINDINGS_FILE)
        self._looked = 0.0
        self._timing = _Guard(self._timing_failed)
        self._showing = _Guard(lambda error: self._print(f"findings of the watch are shown no more: {_words(error)}"))

    def around(
        self,
        step: Step,
        built: BuiltModel,
        *,
        expected: Callable[[], Sequence[Expected] | None],
        is_saving: Callable[[], bool],
        first_step: int,
    ) -> Step:
        """The step, some of whose calls are timed. `first_step` is the number of the first call, `expected` gives what this
        rank should communicate in each (None without formulas), `is_saving` whether another thread may be issuing
        collectives."""
        self._monitor = self._timing(lambda: self._make_monitor(built, is_saving))
        if self._monitor is None:
            return step
        if self._world.is_main and self._job.fabric.profile is not None:
            self._tell_expected(Path(self._job.fabric.profile).expanduser(), expected)
        return _TimedStep(step, self._monitor, self._timing, first_step)

    def on_start(self, facts: RunFacts) -> None:
        """What an earlier start of the run has left is shown no more."""
        self._showing(self._windows.skip)
        self._showing(self._findings.skip)

    def on_step(self, record: StepRecord) -> None:
        """Tells the head of the step, where it was timed. On rank 0 shows what is new, at most once a second."""
        if self._monitor is not None:
            self._timing(partial(self._monitor.tell, record.step, record.step_time_s))
        if self._world.is_main and time.monotonic() > self._looked + _LOOK_SECONDS:
            self._looked = time.monotonic()
            self._showing(self._show)

    def close(self) -> None:
        """This rank has ended, and is not missing from now on."""
        _Guard(lambda error: self._print(f"the watch did not end in good order: {_words(error)}"))(self._watch.close)
        if self._world.is_main:
            self._showing(self._show)

    def _make_monitor(self, built: BuiltModel, is_saving: Callable[[], bool]) -> RankMonitor:
        on_cuda = self._world.device.type == "cuda"
        if on_cuda and (untimed := flight_durations.enable()):
            self._print(f"collectives of {', '.join(untimed)} cannot be timed")
        return RankMonitor(
            flight_durations.FlightDurations() if on_cuda else CollectiveTap(),
            send=self._watch.send,
            members=_members,
            quiet=lambda: not is_saving(),
            role=f"stage {built.mesh.coordinate('pp')}",
            world_size=self._world.world_size,
        )

    def _timing_failed(self, error: Exception) -> None:
        """The head hears of it too: it must not wait for this rank's durations."""
        if self._monitor is not None:
            with suppress(Exception):
                self._monitor.abandon()
        self._print(f"rank {self._world.rank} times its collectives no more: {_words(error)}")
        with suppress(Exception):
            self._watch.send(OFF, {"reason": _words(error)})

    def _print(self, message: str) -> None:
        with suppress(Exception):
            self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def _show(self) -> None:
        for window in self._windows.new_lines():
            figures = {f"fabric/{axis}/wait_s": seconds for axis, seconds in window["wait_s"].items()}
            figures |= {f"fabric/{axis}/network_s": seconds for axis, seconds in window["network_s"].items()}
            figures["fabric/late_s/most"] = max(window["late_s"].values(), default=0.0)
            figures |= {f"fabric/late_s/rank-{rank}": seconds for rank, seconds in window["late_s"].items()}
            for take in self._scalars:
                take(figures, window["step"])
        for finding in self._findings.new_lines():
            self._console.print(f"fabric: {finding['sentence']}", highlight=False, markup=False, soft_wrap=True)

    def _tell_expected(self, profile: Path, expected: Callable[[], Sequence[Expected] | None]) -> None:
        def tell() -> None:
            if (terms := expected()) is not None:
                step = ExpectedStep(profile=read_profile(profile), rows=_expected_rows(terms))
                self._watch.send(EXPECTED, step.as_payload())

        _Guard(lambda error: self._print(f"no times are expected: {_words(error)}"))(tell)


class _Guard:
    """Calls things that the run can do without, until one of them raises: `failed` hears of it, and nothing is called since."""

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._failed = failed
        self._is_off = False

    def __call__(self, act: Callable[[], T]) -> T | None:
        """What `act` returns, or None."""
        if self._is_off:
            return None
        try:
            return act()
        except Exception as error:
            self._is_off = True
            _logger.debug("a part of the monitor has failed", exc_info=True)
            self._failed(error)
            return None


def _words(error: Exception) -> str:
    """User errors are sentences; others need their kind to be understood."""
    return str(error) if isinstance(error, FabricError) else f"{type(error).__name__}: {error}"


def _expected_rows(expected: Sequence[Expected]) -> tuple[CommunicationRow, ...]:
    sizes = {axis: len(ranks) for axis, ranks in _members().values()}
    return tuple(
        CommunicationRow(
            axis=term.key.axis,
            kind=term.key.kind,
            count=term.count,
            num_bytes=term.num_bytes,
            group_size=sizes[term.key.axis],
        )
        for term in expected
        if term.key.axis in sizes
    )


class _TimedStep:
    """A `Step` that does what another does, between a monitor's `begin` and `end`. The first one is left alone: it compiles."""

    def __init__(self, step: Step, monitor: RankMonitor, timing: _Guard, first_step: int) -> None:
        self._step = step
        self._monitor = monitor
        self._timing = timing
        self._first = first_step
        self._number = first_step

    def __call__(
        self, micro_batches: Sequence[TokenBatch], *, lr_factor: float, stop_requested: Callable[[], bool]
    ) -> StepResult:
        """See `TrainStep`."""
        number, self._number = self._number, self._number + 1
        if number == self._first:
            return self._step(micro_batches, lr_factor=lr_factor, stop_requested=stop_requested)
        self._timing(partial(self._monitor.begin, number))
        try:
            return self._step(micro_batches, lr_factor=lr_factor, stop_requested=stop_requested)
        finally:
            self._timing(partial(self._monitor.end, number))


class _Tail:
    """Whole lines that have been added to a file of JSON objects since the last look. A writer that was killed, or had no
    room, leaves lines that are none: they are passed over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def skip(self) -> None:
        """Forgets what is there."""
        self._offset = self._path.stat().st_size if self._path.exists() else 0

    def new_lines(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        found = []
        for line in whole.splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
        return [each for each in found if isinstance(each, dict)]


def _members() -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (axis_name(name, text), ranks) for name, (text, ranks) in group_members().items()}
