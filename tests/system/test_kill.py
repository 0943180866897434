"""`kill -9` of a rank of a real `mega train --ranks 2`, at several moments: the same command continues as if nothing was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from megamodel.train.run_directory import RunDirectory
from tests.megamodel.train.jobs import write_corpus

STEPS = 60
CONFIG = """
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
micro_batch_size = 2
precision = "fp32"
compile = "off"
[train.optimizer]
name = "muon"
[train.checkpoint]
every_steps = 7
[export]
format = "none"
[generate]
max_new_tokens = 2
"""


@contextmanager
def running(root: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """`mega train` on two ranks. Whatever happens, it and the ranks that it started are gone at the end."""
    command = [
        sys.executable,
        "-m",
        "launcher",
        "train",
        str(root / "run.toml"),
        "--ranks",
        "2",
        "--set",
        f"run.name={name}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (root / f"{name}.out").open("ab") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    started = [psutil.Process(process.pid)]
    try:
        yield process
    finally:
        if process.poll() is None:
            started += started[0].children(recursive=True)
            for member in started:
                member.kill()
            process.wait(timeout=30)


def ranks_of(process: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """The processes of the ranks, by rank."""
    found = {}
    for child in psutil.Process(process.pid).children():
        if "RANK" in (environment := child.environ()):
            found[int(environment["RANK"])] = child
    return found


def steps_done(root: Path, name: str) -> list[int]:
    return [line["step"] for line in RunDirectory(root / "runs" / name).read_metrics() if "loss" in line]


def figures(root: Path, name: str) -> list[tuple[int, float, float]]:
    lines = RunDirectory(root / "runs" / name).read_metrics()
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def finish(root: Path, name: str) -> None:
    with running(root, name) as process:
        assert process.wait(timeout=120) == 0, (root / f"{name}.out").read_text()[-3000:]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kill")
    write_corpus(root / "corpus")
    (root / "run.toml").write_text(CONFIG.format(root=root, steps=STEPS))
    finish(root, "whole")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "after_step"), [(1, 1), (0, 13), (1, 30)])
def test_kill_9_of_a_rank_then_the_same_command(undisturbed: Path, rank: int, after_step: int) -> None:
    root, name = undisturbed, f"killed-{rank}-{after_step}"
    with running(root, name) as process:
        deadline = time.monotonic() + 90
        while len(steps_done(root, name)) < after_step:
            assert process.poll() is None, (root / f"{name}.out").read_text()[-3000:]
            assert time.monotonic() < deadline, "no step within 90 s"
            time.sleep(0.01)
        members = ranks_of(process)
        members[rank].send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == 1
        # No orphan steps on.
        _, alive = psutil.wait_procs(list(members.values()), timeout=10)
        assert not alive
    said = (root / f"{name}.out").read_text()
    assert f"rank {rank}" in said
    assert "SIGKILL" in said
    assert len(steps_done(root, name)) < STEPS
    finish(root, name)
    assert figures(root, name) == figures(root, "whole")


@pytest.mark.slow
def test_kill_9_of_the_launcher_leaves_no_rank(undisturbed: Path) -> None:
    root, name = undisturbed, "launcher-killed"
    with running(root, name) as process:
        deadline = time.monotonic() + 90
        while not steps_done(root, name):
            assert process.poll() is None, (root / f"{name}.out").read_text()[-3000:]
            assert time.monotonic() < deadline, "no step within 90 s"
            time.sleep(0.01)
        members = ranks_of(process)
        assert len(members) == 2
        process.kill()
        process.wait(timeout=10)
        _, alive = psutil.wait_procs(list(members.values()), timeout=10)
        assert not alive
    finish(root, name)
    assert figures(root, name) == figures(root, "whole")
