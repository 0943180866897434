"""A run that `mega launch --on torchrun` trains on several hosts, watched by what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from launcher.jobs.job_record import JobFolder, SupervisorState
from megamodel.train.run_directory import RunDirectory
from tests.system.launch.hosts import LaunchHosts

_PATIENCE_SECONDS = 300.0


@dataclass(kw_only=True)
class Launched:
    """The run `name` below `root`/runs, with the configuration `root`/run.toml."""

    hosts: LaunchHosts
    root: Path
    name: str
    settings: tuple[str, ...] = ()
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """The process of `mega launch` on each host."""

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.root / "runs" / self.name)

    def said(self, host: str) -> str:
        """What `mega launch` has printed on a host."""
        path = self._output(host)
        return path.read_text() if path.exists() else ""

    @contextmanager
    def started(self) -> Iterator[None]:
        """On all hosts. Nothing of it is left at the end, whatever happens."""
        try:
            for host in self.hosts.names:
                self.start(host)
            yield
        finally:
            for host in self.hosts.names:
                self.hosts.kill(host)
                self.hosts.revive(host)

    def start(self, host: str) -> None:
        """`mega launch` on one host."""
        hostfile = self.root / "hosts"
        hostfile.write_text("".join(f"{name}\n" for name in self.hosts.names))
        settings = (f"run.directory={self.root}/runs", f"run.name={self.name}", *self.settings)
        command = [sys.executable, "-m", "launcher", "launch", str(self.root / "run.toml"), "--on", "torchrun"]
        command += ["--hostfile", str(hostfile)]
        for setting in settings:
            command += ["--set", setting]
        self.nodes[host] = self.hosts.start(host, command, output=self._output(host), cwd=self.root)

    def cancel_now(self, host: str) -> int:
        """`mega cancel --now` on one host; its exit code."""
        command = [sys.executable, "-m", "launcher", "cancel", str(self.directory.root), "--now"]
        return self.hosts.start(host, command, output=self._output(host), cwd=self.root).wait(timeout=60.0)

    def end(self, *, seconds: float = _PATIENCE_SECONDS) -> dict[str, int]:
        """Waits until all hosts are done, and nothing is left on them; the exit codes."""
        deadline = time.monotonic() + seconds
        for host, process in self.nodes.items():
            try:
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{host} is not done\n{self.account()}") from None
        for host in self.hosts.names:
            # The watcher of a run is the last to go, once it has seen the ends of its ranks.
            _, alive = psutil.wait_procs(self.hosts.processes(host), timeout=60.0)
            assert not alive, [process.cmdline() for process in alive]
        return {host: process.returncode for host, process in self.nodes.items()}

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Looks at what the run writes until it is `ready`."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not ready():
            assert time.monotonic() < deadline, f"not there within {_PATIENCE_SECONDS:g} s\n{self.account()}"
            time.sleep(0.02)  # files have no event to wait for

    def ranks(self, host: str) -> list[psutil.Process]:
        """The processes of the ranks on a host."""
        found = []
        for process in self.hosts.processes(host, "launcher", "train"):
            with suppress(psutil.Error):  # gone since
                if "RANK" in process.environ():
                    found.append(process)
        return found

    def figures(self) -> list[tuple[int, float, float]]:
        """(step, loss, gradient norm) of each step."""
        lines = self.directory.read_metrics()
        return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Of that name, in order."""
        if not self.directory.events.exists():
            return []
        lines = self.directory.events.read_text().splitlines(keepends=True)
        return [event for line in lines if line[-1:] == "\n" and (event := json.loads(line))["event"] == name]

    def state(self) -> SupervisorState | None:
        """As the supervisor has written it last."""
        return JobFolder(self.directory).read_state()

    def account(self) -> str:
        """All that hosts and their agents have said, for the one who reads of a failure."""
        paths = [self._output(host) for host in self.hosts.names]
        paths += [*sorted(self.directory.logs.glob("*/*.log")), self.directory.events]
        return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in paths if path.exists())

    def _output(self, host: str) -> Path:
        return self.root / f"{self.name}-{host}.out"
