"""What a job keeps beside its run, in `runs/<name>/launch/`: how it was started, and how its supervisor sees it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from megamodel.train.run_directory import RunDirectory

JobState = Literal["queued", "running", "restarting", "finished", "failed"]
BackendName = Literal["local", "torchrun", "slurm", "mpi"]
T = TypeVar("T")


def _say_on_stderr(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{text}\n")


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """How a job was started; written once by `mega launch`, and again where it is submitted anew."""

    backend: BackendName
    job_id: str | None
    """Of SLURM. None elsewhere."""
    submitted: float
    """Seconds since 1970. Of a script that somebody submits again without `mega launch`: when its supervisor began."""
    submitted_from: str
    """Host."""
    nodes: int
    """Hosts asked for, spares included."""
    earlier_job_ids: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SupervisorState:
    """The supervisor's account of itself. Rewritten whole at least every few seconds while it lives."""

    state: JobState
    host: str
    pid: int
    updated: float
    """Seconds since 1970."""
    attempt: int = 0
    """Number of the attempt, which is that of its folder in logs/; 0 before the first."""
    restarts: int = 0
    """Attempts after the first, over all starts of the job."""
    requeues: int = 0
    attempts_without_progress: int = 0
    last_checkpoint: int = 0
    """Step of the newest checkpoint when the last attempt ended."""
    cause: str | None = None
    """Why the last attempt ended, in one line, where it failed; why the job failed."""
    hosts: tuple[str, ...] = ()
    """That train now."""
    excluded_hosts: dict[str, str] = field(default_factory=dict)
    """Hosts that are not used any more, with the reason."""


class JobFolder:
    """`runs/<name>/launch/`. `say` hears of a damaged file, which counts as not there."""

    def __init__(self, run: RunDirectory, *, say: Callable[[str], None] = _say_on_stderr) -> None:
        self._say = say
        self.root = run.root / "launch"
        self.config = self.root / "config.toml"
        """The configuration as it was submitted: what is changed later in the user's files changes no queued job."""
        self.script = self.root / "job.sh"
        self.output = self.root / "supervisor.log"
        self.end = self.root / "end"
        """torchrun: the exit code of a job that has ended, for hosts that cannot hear it any more."""
        self._record = self.root / "job.json"
        self._state = self.root / "state.json"
        self._excluded = self.root / "excluded_hosts.json"
        self._cancel = self.root / "cancel"

    def write_record(self, record: JobRecord) -> None:
        """Whole or not at all."""
        _write(self._record, asdict(record))

    def read_record(self) -> JobRecord | None:
        """None where no job was launched here, or the file is damaged."""
        return self._read(
            self._record, lambda data: JobRecord(**{**data, "earlier_job_ids": tuple(data["earlier_job_ids"])})
        )

    def forget_record(self) -> None:
        """Of a job that was not started after all."""
        self._record.unlink(missing_ok=True)

    def write_state(self, state: SupervisorState) -> SupervisorState:
        """Whole or not at all; returns it with the time of now."""
        state = replace(state, updated=time.time())
        _write(self._state, asdict(state))
        return state

    def read_state(self) -> SupervisorState | None:
        """None where no supervisor has begun, or the file is damaged."""
        return self._read(self._state, lambda data: SupervisorState(**{**data, "hosts": tuple(data["hosts"])}))

    def excluded_hosts(self) -> dict[str, str]:
        """Hosts that SLURM is not to give to this run any more, with the reason: those of earlier jobs too. Where hosts are
        listed by hand, who lists one again wants it again."""
        kept = self._read(self._excluded, lambda data: {str(host): str(reason) for host, reason in dict(data).items()})
        record, state = self.read_record(), self.read_state()
        found = state.excluded_hosts if record is not None and record.backend == "slurm" and state is not None else {}
        return {**(kept or {}), **found}

    def keep_excluded_hosts(self, hosts: Mapping[str, str]) -> None:
        """Over launches."""
        if hosts or self._excluded.exists():
            _write(self._excluded, dict(hosts))

    def ask_to_cancel(self) -> None:
        """`mega cancel` says so here before it signals: who is told to stop then knows that it is for good."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._cancel.touch()

    def is_cancelled(self) -> bool:
        """Whether somebody has asked to end the job for good."""
        return self._cancel.exists()

    def forget_cancel(self) -> None:
        """Of a job that has ended, and that somebody starts again."""
        self._cancel.unlink(missing_ok=True)

    def forget_before_launch(self) -> None:
        """What an earlier job of this run has left and a new one must not read."""
        for path in (self._cancel, self._state):
            path.unlink(missing_ok=True)

    def _read(self, path: Path, parse: Callable[[dict[str, Any]], T]) -> T | None:
        try:
            return parse(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            self._say(
                f"{path} is damaged ({error}), as a crash may leave it: it counts as not there, and is written anew"
            )
            return None


def _write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())  # else a host that crashes may leave an empty file under the final name
    os.replace(partial, path)
