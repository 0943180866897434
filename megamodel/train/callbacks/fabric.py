"""The run under watch: who hangs, who is slow, which group's network is. Every rank has a part of it.

What is found is written by the watch itself, to events.jsonl and `fabric/`; here it is only shown.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.errors import FabricError
from cluster.fabric.monitor import flight_durations
from cluster.fabric.monitor.expected import ExpectedStep, read_profile
from cluster.fabric.monitor.head_analyser import WINDOWS_FILE, analyser_spec
from cluster.fabric.monitor.rank_messages import EXPECTED
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

Scalars = Callable[[Mapping[str, float], int], None]


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
    except FabricError as error:
        console.print(f"this run is not watched: {error}", highlight=False, markup=False, soft_wrap=True)
        return None
    return FabricMonitor(job, world, watch, console=console, scalars=scalars)


class FabricMonitor(Callback):
    """One rank's part of a watched run: times collectives in some of its steps; on rank 0 shows what the watch found."""

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

    def around(
        self,
        step: Step,
        built: BuiltModel,
        *,
        expected: Sequence[Expected] | None,
        is_saving: Callable[[], bool],
        first_step: int,
    ) -> Step:
        """The step, some of whose calls are timed. `first_step` is the number of the first call, `expected` what this rank
        should communicate in each, `is_saving` whether another thread may be issuing collectives."""
        if self._world.device.type == "cuda":
            flight_durations.enable()
        self._monitor = RankMonitor(
            flight_durations.FlightDurations() if self._world.device.type == "cuda" else CollectiveTap(),
            send=self._watch.send,
            members=_members,
            quiet=lambda: not is_saving(),
            role=f"stage {built.mesh.coordinate('pp')}",
            world_size=self._world.world_size,
        )
        if self._world.is_main and self._job.fabric.profile is not None and expected is not None:
            self._tell_expected(Path(self._job.fabric.profile).expanduser(), expected)
        return _TimedStep(step, self._monitor, first_step)

    def on_start(self, facts: RunFacts) -> None:
        """What an earlier start of the run has left is shown no more."""
        self._windows.skip()
        self._findings.skip()

    def on_step(self, record: StepRecord) -> None:
        """Tells the head of the step, where it was timed. On rank 0 shows what is new, at most once a second."""
        if self._monitor is not None:
            self._monitor.tell(record.step, record.step_time_s)
        if self._world.is_main and time.monotonic() > self._looked + _LOOK_SECONDS:
            self._looked = time.monotonic()
            self._show()

    def close(self) -> None:
        """This rank has ended, and is not missing from now on."""
        self._watch.close()
        if self._world.is_main:
            self._show()

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

    def _tell_expected(self, profile: Path, expected: Sequence[Expected]) -> None:
        sizes = {axis: len(ranks) for axis, ranks in _members().values()}
        rows = tuple(
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
        try:
            self._watch.send(EXPECTED, ExpectedStep(profile=read_profile(profile), rows=rows).as_payload())
        except FabricError as error:
            self._console.print(f"no times are expected: {error}", highlight=False, markup=False, soft_wrap=True)


class _TimedStep:
    """A `Step` that does what another does, between a monitor's `begin` and `end`. The first one is left alone: it compiles."""

    def __init__(self, step: Step, monitor: RankMonitor, first_step: int) -> None:
        self._step = step
        self._monitor = monitor
        self._first = first_step
        self._number = first_step

    def __call__(
        self, micro_batches: Sequence[TokenBatch], *, lr_factor: float, stop_requested: Callable[[], bool]
    ) -> StepResult:
        """See `TrainStep`."""
        number, self._number = self._number, self._number + 1
        if number == self._first:
            return self._step(micro_batches, lr_factor=lr_factor, stop_requested=stop_requested)
        self._monitor.begin(number)
        try:
            return self._step(micro_batches, lr_factor=lr_factor, stop_requested=stop_requested)
        finally:
            self._monitor.end(number)


class _Tail:
    """Whole lines that have been added to a file of JSON objects since the last look."""

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
        return [json.loads(line) for line in whole.splitlines()]


def _members() -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (axis_name(name, text), ranks) for name, (text, ranks) in group_members().items()}
