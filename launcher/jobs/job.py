"""What a supervisor is given, and what it gives back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.config import RunConfig
from launcher.jobs.backend import Backend
from launcher.jobs.config import LaunchConfig
from launcher.jobs.job_record import JobFolder
from megamodel.train.run_directory import RunDirectory


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long the supervisor waits for what should not take long, in seconds."""

    own_end: float = 3.0
    """After a rank has failed: for the others' accounts, among which the first cause may be."""
    known_cause: float = 1.0
    """The same, where a signal or the loss of a host is the failure: there seldom is a better account."""
    terminated: float = 2.0
    """For ranks to end on SIGTERM, before they are killed."""
    result: float = 5.0
    """After rank 0 has ended as if all were done: for its result to be seen here, over a file system of many hosts."""
    done: float = 20.0
    """After rank 0 has done all: for the other ranks to end too."""
    starter: float = 5.0
    """For agents to be missed once the program that started them has ended."""
    released: float = 2.0
    """For that program to end once its agents have been sent home."""
    signal: float = 2.0
    """Where ranks have stopped that nobody here has asked to: for the signal to come here too."""
    look: float = 0.5
    """Between two looks at what the watch of the run and preflight have written."""
    watch: float = 3.0
    """After a failure: for the watch of the run to tell where the rank is missed."""
    hosts: float = 2.0
    """Between two looks for hosts that have come back."""
    not_begun: float = 20.0
    """Before another attempt at the least, after one in which no rank could be started: what is wrong, such as a file system
    that is away, often heals by itself."""
    scheduler: float = 600.0
    """For a scheduler that does not answer to do so after all."""
    scheduler_look: float = 5.0
    """Between two questions to it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job."""

    config_file: Path
    """`runs/<name>/launch/config.toml`: what ranks are started with."""
    config: RunConfig
    """What that file holds."""
    backend: Backend
    ranks_per_host: int
    say: Callable[[str], None]
    """Gets lines for the user."""
    show: Callable[[str], None] | None = None
    """Gets the ranks' output, folded, where somebody looks on."""
    command: Sequence[str] | None = None
    """Of a rank. Left out: `mega train` with `config_file`."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """More for the ranks' environment."""
    patience: Patience = field(default_factory=Patience)

    @property
    def launch(self) -> LaunchConfig:
        """Its section of the configuration."""
        return self.config.launch

    @property
    def run(self) -> RunDirectory:
        """The run's folder."""
        return RunDirectory(self.config.run_directory)

    @property
    def folder(self) -> JobFolder:
        """The job's folder."""
        return JobFolder(self.run)

    @property
    def rank_command(self) -> tuple[str, ...]:
        """Starts a rank."""
        if self.command is not None:
            return tuple(self.command)
        return (sys.executable, "-m", "launcher", "train", str(self.config_file))


@dataclass(frozen=True, kw_only=True)
class JobEnd:
    """How a job ended."""

    exit_code: int
    """0 done, 1 failed, 2 wrong configuration, 3 a check said no, 75 stopped with all saved (or to go on in another start),
    130 ended by a second Ctrl-C."""
    cause: str | None = None
    """In one line, where it is not done."""
    result: Mapping[str, Any] | None = None
    """Of a finished run: what rank 0 says of it."""
    requeued: bool = False
    """Whether it goes on in another start."""
