"""A run that `mega launch --on slurm` starts on hosts of a real SLURM, watched by what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.jobs.job_record import JobFolder, SupervisorState
from megamodel.train.run_directory import RunDirectory
from tests.megamodel.train.jobs import write_corpus
from tests.system.slurm.cluster import SlurmOfHosts

RANKS = 4
STEPS = 120
EVERY_STEPS = 10
"""Steps from one checkpoint to the next."""
_CONFIG = """
[run]
seed = 5
directory = "{root}/runs"
[model]
preset = "moe-tiny"
[data]
source = "text"
path = "{root}/corpus"
cache_directory = "{root}/cache"
seq_len = 32
held_out_fraction = 0.1
tokenizer = {{ vocab_size = 280 }}
[train]
steps = {steps}
global_batch_size = 8
precision = "fp32"
compile = "off"
[train.checkpoint]
every_steps = {every_steps}
[export]
format = "none"
[generate]
max_new_tokens = 2
[launch]
nodes = {ranks}
# Four ranks start on two cores here; hosts that are in good order need seconds.
lost_host_seconds = 10.0
restart_delay_seconds = 0.2
wait_for_hosts_seconds = 90.0
[launch.preflight]
fabric = false
[slurm]
partition = "low"
"""


def write_run_files(root: Path) -> Path:
    """The text to train on, and the configuration of the runs below `root`; returns the latter's path."""
    write_corpus(root / "corpus")
    path = root / "run.toml"
    path.write_text(_CONFIG.format(root=root, steps=STEPS, every_steps=EVERY_STEPS, ranks=RANKS))
    return path


def undisturbed(root: Path) -> LaunchedFigures:
    """What the run computes as four ranks of one machine, without a launcher between."""
    settings = ["--set", "run.name=whole", "--set", f"run.directory={root}/runs"]
    command = [sys.executable, "-m", "launcher", "train", str(root / "run.toml"), "--ranks", str(RANKS), *settings]
    subprocess.run(command, check=True, timeout=180, capture_output=True)
    return figures_of(RunDirectory(root / "runs" / "whole"))


LaunchedFigures = list[tuple[int, int, float, float]]


def figures_of(directory: RunDirectory) -> LaunchedFigures:
    """(step, tokens up to it, loss, gradient norm) of each step, as metrics.jsonl has them."""
    lines = directory.read_metrics()
    return [(line["step"], line["tokens"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def assert_equal_figures(given: LaunchedFigures, whole: LaunchedFigures, *, same_layout: bool) -> None:
    """The same steps and samples; losses and gradient norms to the last bit, or on another layout to 1e-5."""
    if same_layout:
        assert given == whole
        return
    assert [line[:2] for line in given] == [line[:2] for line in whole]
    for mine, undisturbed in zip(given, whole):
        assert mine[2:] == pytest.approx(undisturbed[2:], abs=1e-5, rel=1e-5)


@dataclass
class LaunchedRun:
    """One run of the configuration that `write_run_files` wrote below `root`."""

    cluster: SlurmOfHosts
    root: Path
    name: str
    settings: tuple[str, ...] = ()
    run_root: Path | None = None
    """Folder of runs, where it is not `root`/runs."""

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory((self.run_root or self.root / "runs") / self.name)

    @property
    def folder(self) -> JobFolder:
        return JobFolder(self.directory)

    def launch(self) -> int:
        """Submits it and returns the job's number."""
        done = self.mega("launch", str(self.root / "run.toml"), "--on", "slurm", "--json", *self._sets())
        return int(json.loads(done.stdout)["job_id"])

    def mega(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`mega WORDS`, on the host where users log in."""
        command = [sys.executable, "-m", "launcher", *words]
        environment = {"OMP_NUM_THREADS": "1"}
        return self.cluster.run(*command, cwd=self.root, timeout=120, check=check, env=environment)

    def status(self) -> dict[str, Any]:
        """What `mega status --json` answers."""
        answer: dict[str, Any] = json.loads(self.mega("status", str(self.directory.root), "--json").stdout)
        return answer

    def state(self) -> SupervisorState | None:
        """The supervisor's own account, read without starting a process."""
        return self.folder.read_state()

    def figures(self) -> LaunchedFigures:
        return figures_of(self.directory)

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Of these names, in order; all without a name."""
        found = []
        if self.directory.events.exists():
            for line in self.directory.events.read_text().splitlines():
                with suppress(json.JSONDecodeError):  # a line that is being written
                    event = json.loads(line)
                    if not names or event["event"] in names:
                        found.append(event)
        return found

    def wait_until(
        self, ready: Callable[[], bool], *, seconds: float = 240.0, what: str = "what was waited for"
    ) -> None:
        """Looks until it is `ready`; fails, with all that is known, where that takes longer or the job has ended before."""
        deadline = time.monotonic() + seconds
        while not ready():
            state = self.state()
            ended = state is not None and state.state in ("finished", "failed")
            assert not ended or ready(), f"ended before {what}\n{self.account()}"
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}\n{self.account()}"
            time.sleep(0.01)  # files have no event to wait for

    def wait_for_step(self, step: int) -> None:
        """Until that step is done."""
        self.wait_until(lambda: len(self.figures()) >= step, what=f"step {step}")

    def wait_for_end(self, *, seconds: float = 400.0) -> SupervisorState:
        """Until the supervisor says that the run has finished or failed."""

        def has_ended() -> bool:
            state = self.state()
            return state is not None and state.state in ("finished", "failed")

        self.wait_until(has_ended, seconds=seconds, what="the end")
        state = self.state()
        assert state is not None
        return state

    def finish(self) -> None:
        """Waits for a good end, in which nothing is left on any host."""
        state = self.wait_for_end()
        assert state.state == "finished", self.account()

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of this run's ranks, by rank."""
        found = {}
        for process in self._processes(" train "):
            with suppress(psutil.Error):  # gone since
                if (rank := process.environ().get("RANK")) is not None:
                    found[int(rank)] = process
        return found

    def supervisor(self) -> psutil.Process:
        """The batch script's process."""
        folder = str(self.directory.root)
        (found,) = [
            process
            for host in self.cluster.names
            for process in self.cluster.processes(host)
            if {"supervise", folder} <= set(process.cmdline())
        ]
        return found

    def agents(self) -> dict[str, psutil.Process]:
        """The agents of this run, by host."""
        found = {}
        for process in self._processes(" agent"):
            with suppress(psutil.Error):
                found[process.environ()["SLURMD_NODENAME"]] = process
        return found

    def orphans(self) -> list[psutil.Process]:
        """What is left of this run's ranks and agents."""
        return [*self.ranks().values(), *self.agents().values()]

    def wait_until_nothing_is_left(self, *, seconds: float = 90.0) -> None:
        """An ended run has no process anywhere."""
        deadline = time.monotonic() + seconds
        while left := self.orphans():
            assert time.monotonic() < deadline, f"{left}\n{self.account()}"
            psutil.wait_procs(left, timeout=0.5)

    def account(self) -> str:
        """All that the run and SLURM say of it."""
        logs = sorted(self.directory.logs.glob("*/*.log"))[-3:]
        parts = [f"state: {self.state()}", *(json.dumps(event) for event in self.events()[-30:])]
        for path in [self.folder.output, *logs]:
            if path.exists():
                parts.append(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-40:]))
        return "\n".join([*parts, self.cluster.logs()])

    def _processes(self, word: str) -> list[psutil.Process]:
        found = []
        for host in self.cluster.names:
            for process in self.cluster.processes(host):
                with suppress(psutil.Error):
                    line = " ".join(process.cmdline()) + " "
                    mine = process.environ().get("MEGA_RUN") == str(self.directory.root)
                    if "launcher" in line and word in line and mine and process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
        return found

    def _sets(self) -> list[str]:
        settings = [f"run.name={self.name}", *self.settings]
        if self.run_root is not None:
            settings.append(f"run.directory={self.run_root}")
        return [word for setting in settings for word in ("--set", setting)]
