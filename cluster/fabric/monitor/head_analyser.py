"""The monitor at the head of the watch: hears all ranks, writes windows down, and names who is slow. Without torch."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.errors import FabricError
from cluster.fabric.findings import Finding
from cluster.fabric.monitor.durations import RankLists, StepDurations
from cluster.fabric.monitor.expected import ExpectedStep
from cluster.fabric.monitor.gathering import SILENT_STEPS, Gathering
from cluster.fabric.monitor.prometheus import PrometheusEndpoint
from cluster.fabric.monitor.rank_messages import DURATIONS, EXPECTED, OFF
from cluster.fabric.monitor.stragglers import StragglerSearch
from cluster.fabric.monitor.windows import Window
from cluster.fabric.watch.setup import AnalyserSpec, HeadContext

FOLDER = "fabric"
WINDOWS_FILE = "windows.jsonl"
MOST_RANKS = 256
"""Ranks whose lateness stands in a line of the file: where there are more, those of the latest."""
_MOST_NAMED = 16
_COMPARED_WINDOW = 3
"""The first ones of a start are still warming up."""


def analyser_spec(*, window_steps: int, prometheus_port: int | None) -> AnalyserSpec:
    """How the head finds `monitor_analyser`."""
    return AnalyserSpec(
        factory="cluster.fabric.monitor.head_analyser:monitor_analyser",
        options={"window_steps": window_steps, "prometheus_port": prometheus_port},
    )


def monitor_analyser(context: HeadContext) -> MonitorAnalyser:
    """For `AnalyserSpec`: options are `window_steps` and `prometheus_port`."""
    return MonitorAnalyser(context)


class MonitorAnalyser:
    """A `HeadAnalyser` of the messages in `rank_messages`.

    Each window of steps becomes a line of `fabric/windows.jsonl`: `step, first_step, step_s, wait_s` (axis -> seconds that a
    rank stands still, a step), `network_s` (axis -> seconds that its collectives take when nobody is late), `late_s` (rank ->
    seconds), `busy_s` (rank -> seconds), `cost_share` (of the monitor).
    """

    def __init__(self, context: HeadContext) -> None:
        self._context = context
        self._path = context.directory / FOLDER / WINDOWS_FILE
        self._gathering = Gathering(
            world_size=context.world_size, window_steps=int(context.options.get("window_steps") or 1)
        )
        self._search = StragglerSearch(host_of=context.host_of)
        self._lists = RankLists()
        self._unwritten = 0
        self._problem = ""
        self._new: list[Finding] = []
        self._told: Counter[str] = Counter()
        self._expected: ExpectedStep | None = None
        self._num_windows = 0
        self._endpoint = self._open_endpoint(context.options.get("prometheus_port"))

    def on_message(self, rank: int, kind: str, payload: Mapping[str, Any], now: float) -> None:
        """See `HeadAnalyser`."""
        if kind == EXPECTED:
            self._expected = ExpectedStep.from_payload(payload)
        elif kind == DURATIONS:
            for window in self._gathering.add(rank, StepDurations.from_payload(payload, self._lists), now):
                self._close(window)
        elif kind == OFF:
            self._gathering.leave_out(rank)
            reason = f"rank {rank} on {self._context.host_of(rank)} times its collectives no more: {payload['reason']}"
            self._event("notice", {"message": reason})

    def tick(self, now: float) -> Sequence[Finding]:
        """See `HeadAnalyser`."""
        for window in self._gathering.expire(now):
            self._close(window)
        if silent := self._gathering.new_silent_ranks():
            named = ", ".join(map(str, silent[:_MOST_NAMED])) + (", ..." if len(silent) > _MOST_NAMED else "")
            message = (
                f"the durations of {len(silent)} rank(s) do not get through, of {SILENT_STEPS} watched steps in a row: {named}; "
                "the others are judged without them"
            )
            self._event("ranks_silent", {"ranks": list(silent), "message": message})
        new, self._new = self._new, []
        return new

    def close(self) -> None:
        """See `HeadAnalyser`."""
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    def _close(self, window: Window) -> None:
        self._num_windows += 1
        before = self._search.stragglers
        findings = self._search.add(window)
        for rank in sorted(before - self._search.stragglers):
            host = self._context.host_of(rank)
            message = f"rank {rank} on {host} keeps up with the others again since step {window.first_step}"
            self._event("straggler_gone", {"step": window.last_step, "rank": rank, "message": message})
        self._new += findings
        self._told.update(finding.kind for finding in findings)
        self._write(window)
        if self._endpoint is not None:
            self._endpoint.show(window, self._told)
        if self._expected is not None and self._num_windows == _COMPARED_WINDOW:
            self._event("communication_time", self._expected.beside(window))

    def _write(self, window: Window) -> None:
        """A full disk costs lines of the file, and nothing else; how many is told once there is room again."""
        try:
            _append(self._path, _line(window))
        except OSError as error:
            self._unwritten += 1
            self._problem = str(error)
            return
        if self._unwritten:
            message = f"{self._unwritten} line(s) of {FOLDER}/{WINDOWS_FILE} could not be written: {self._problem}"
            self._unwritten = 0
            self._event("notice", {"message": message})

    def _event(self, name: str, details: Mapping[str, Any]) -> None:
        with suppress(OSError):  # no room: findings must still be told
            self._context.event(name, details)

    def _open_endpoint(self, port: int | None) -> PrometheusEndpoint | None:
        if port is None:
            return None
        try:
            endpoint = PrometheusEndpoint(port)
        except FabricError as error:  # the run and the rest of the monitor go on without
            self._event("notice", {"message": str(error)})
            return None
        self._event("notice", {"message": endpoint.notice})
        return endpoint


def _line(window: Window) -> dict[str, Any]:
    latest = sorted(window.late_s, key=lambda rank: -window.late_s[rank])[:MOST_RANKS]
    shown = sorted(latest)
    return {
        "step": window.last_step,
        "first_step": window.first_step,
        "step_s": window.step_s,
        "wait_s": {axis: times.waited_s for axis, times in window.axes.items()},
        "network_s": {axis: times.floor_s for axis, times in window.axes.items()},
        "late_s": {str(rank): window.late_s[rank] for rank in shown},
        "busy_s": {str(rank): window.busy_s[rank] for rank in shown if rank in window.busy_s},
        "cost_share": window.cost_share,
    }


def _append(path: Path, line: Mapping[str, Any]) -> None:
    """In one write; half a line, of a full disk or a killed process, is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        glue = b""
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            glue = b"\n"
        file.write(glue + json.dumps(line).encode() + b"\n")
