"""Real `mega train` processes, watched by what they write, and gone when a test ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from launcher.rank_process import SUPERVISOR_PID
from megamodel.train.run_directory import RunDirectory

_PATIENCE_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """`mega train CONFIG --ranks N --set ...` of the run `name` below `root`/runs."""

    root: Path
    name: str
    config: Path
    ranks: int
    settings: tuple[str, ...] = ()

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.root / "runs" / self.name)

    @property
    def said(self) -> str:
        """All that its starts wrote to the terminal."""
        return self._terminal.read_text()

    @property
    def _terminal(self) -> Path:
        return self.root / f"{self.name}.out"

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[bytes]]:
        """The run's launcher. Whatever happens, it and all that came of it are gone at the end."""
        settings = (f"run.directory={self.root}/runs", f"run.name={self.name}", *self.settings)
        command = [sys.executable, "-m", "launcher", "train", str(self.config), "--ranks", str(self.ranks)]
        for setting in settings:
            command += ["--set", setting]
        with self._terminal.open("ab") as out:
            process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=out, stderr=out)
        try:
            yield process
        finally:
            process.kill()
            process.wait(timeout=30)
            for member in descendants(process.pid):
                with suppress(psutil.NoSuchProcess):
                    member.kill()

    def finish(self) -> None:
        """Starts it and waits for a good end."""
        with self.started() as process:
            assert process.wait(timeout=250) == 0, self.said[-3000:]

    def wait_until(self, process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
        """Looks at what the run writes until it is `ready`; the run must not end before."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not ready():
            assert process.poll() is None, self.said[-3000:]
            assert time.monotonic() < deadline, f"not there within {_PATIENCE_SECONDS:g} s"
            time.sleep(0.01)  # files have no event to wait for

    def figures(self) -> list[tuple[int, float, float]]:
        """(step, loss, gradient norm) of each step."""
        lines = self.directory.read_metrics()
        return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]

    def steps_of(self, event: str) -> list[int]:
        """At which steps something happened, by events.jsonl."""
        if not self.directory.events.exists():
            return []
        events = [
            json.loads(line)
            for line in self.directory.events.read_text().splitlines(keepends=True)
            if line[-1:] == "\n"
        ]
        return [line["step"] for line in events if line["event"] == event]


def descendants(launcher: int) -> list[psutil.Process]:
    """All processes that came of a launcher, by what it tells its ranks and they tell theirs; also once it has ended."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone, or somebody else's
            if process.environ().get(SUPERVISOR_PID) == str(launcher) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_until_gone(launcher: int, *, seconds: float = 60.0) -> list[psutil.Process]:
    """What of a launcher's descendants is left after `seconds`: none, as a rule. The watcher of a run is the last to go, once
    it has seen the ends of its ranks."""
    deadline = time.monotonic() + seconds
    while (left := descendants(launcher)) and time.monotonic() < deadline:
        psutil.wait_procs(left, timeout=1.0)
    return left


def ranks_of(process: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """The processes of the ranks, by rank."""
    children = {child.pid for child in psutil.Process(process.pid).children()}
    return {int(member.environ()["RANK"]): member for member in descendants(process.pid) if member.pid in children}
