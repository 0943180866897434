"""SLURM's programs as small scripts on PATH, which write down how they are called."""

from __future__ import annotations

from pathlib import Path

import pytest

_PROGRAMS = ("sbatch", "scontrol", "srun", "scancel", "sinfo", "squeue")
RUNNING_JOB = (
    "JobId=7 JobName=mega-tiny JobState=RUNNING Reason=None Requeue=1 Restarts=0 ExitCode=0:0 PreemptTime=None "
    "Partition=low ReqNodeList=(null) ExcNodeList=(null) NodeList=n[1-4] BatchHost=n1 NumNodes=4"
)


class FakeSlurm:
    """Programs in a folder. Each does nothing, successfully, until it is told what to do."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._calls = folder / "calls"
        folder.mkdir(parents=True, exist_ok=True)
        for name in _PROGRAMS:
            self.program(name, "")
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURMD_NODENAME"):
            monkeypatch.delenv(name, raising=False)

    def program(self, name: str, body: str) -> None:
        """`body` is shell; $FAKE is this folder."""
        path = self.folder / name
        partial = path.with_suffix(".new")
        partial.write_text(f'#!/bin/sh\nFAKE={self.folder}\necho "{name} $*" >> "$FAKE/calls"\n{body}\n')
        partial.chmod(0o755)
        partial.rename(path)  # one that is running may not be written to

    def job(self, text: str = RUNNING_JOB, **changes: str) -> None:
        """What `scontrol show job` says."""
        words = dict(word.split("=", 1) for word in text.split())
        line = " ".join(f"{name}={value}" for name, value in {**words, **changes}.items())
        (self.folder / "job").write_text(line + "\n")
        self.program("scontrol", '[ "$*" = "--oneliner show job 7" ] && cat "$FAKE/job"; exit 0')

    def calls(self, name: str | None = None) -> list[str]:
        """How the programs were called, in order."""
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return [line for line in lines if name is None or line.split()[0] == name]
