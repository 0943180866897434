"""A tiny run: a few documents and the smallest preset, in a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import build_app
from launcher.jobs.job_record import JobFolder, JobRecord
from megamodel.train.run_directory import RunDirectory
from tests.launcher.jobs.fake_slurm import FakeSlurm

_CONFIG = """
[run]
name = "tiny"
[model]
preset = "moe-tiny"
[data]
source = "text"
path = "corpus"
held_out_fraction = 0.2
seq_len = 64
tokenizer.vocab_size = 300
[train]
steps = 4
global_batch_size = 4
precision = "fp32"
compile = "off"
checkpoint.every_steps = 2
log.every_steps = 1
[generate]
prompts = ["one "]
max_new_tokens = 4
"""
_TAKES = """
case "$1" in
    --test-only) cat > /dev/null; echo "sbatch: Job 7 to start at noon using 4 processors on nodes n1" >&2;;
    *) echo "7;hosts";;
esac
"""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output."""
        return json.loads(self.out)


Mega = Callable[..., Ended]


@pytest.fixture
def mega(capsys: pytest.CaptureFixture[str]) -> Mega:
    """Runs a verb in this process."""

    def mega(*arguments: str | Path) -> Ended:
        capsys.readouterr()
        try:
            build_app()([str(argument) for argument in arguments])
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return Ended(code=code, out=out, err=err)

    return mega


@pytest.fixture
def mega_process() -> Mega:
    """Runs a verb in a process of its own, in the working directory."""

    def mega_process(*arguments: str | Path, **environ: str) -> Ended:
        run = subprocess.run(
            [sys.executable, "-m", "launcher", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        )
        return Ended(code=run.returncode, out=run.stdout, err=run.stderr)

    return mega_process


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a tiny run; its folder is the working directory."""
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(20):
        words = [f"word{(number * step) % 17}" for step in range(60)]
        (corpus / f"{number}.txt").write_text(f"Document {number}.\n" + " ".join(words) + "\n")
    config = tmp_path / "tiny.toml"
    config.write_text(_CONFIG)
    return config


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Only these programs of SLURM are there."""
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


@pytest.fixture
def queue(fake_slurm: FakeSlurm) -> FakeSlurm:
    """A SLURM that takes each job, as job 7, and knows of none."""
    fake_slurm.program("sbatch", _TAKES)
    return fake_slurm


@pytest.fixture
def folder(tiny: Path) -> JobFolder:
    """Of the run `tiny`."""
    return JobFolder(RunDirectory(tiny.parent / "runs" / "tiny"))


def job_record(**changes: object) -> JobRecord:
    """Of job 5, which is submitted just now."""
    fields = {"backend": "slurm", "job_id": "5", "submitted": time.time(), "submitted_from": "x", "nodes": 1}
    return JobRecord(**{**fields, **changes})  # type: ignore[arg-type]
