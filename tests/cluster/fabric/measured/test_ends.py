"""Ranks that never come or die, and MPI: each rank a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tests.requirements import mpirun, requires

_LIMIT_S = 150.0
_LONE_RANK = (sys.executable, "-m", "tests.cluster.fabric.measured.lone_rank")
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def _run(ranks: Sequence[int], size: int, what: str) -> tuple[dict[int, Any], dict[int, int]]:
    """What each of `ranks` answered, and the exit code of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = {
        rank: subprocess.Popen(
            [*_LONE_RANK, str(rank), str(size), address, what], env=_ENVIRONMENT, stdout=subprocess.PIPE, text=True
        )
        for rank in ranks
    }
    try:
        said = {rank: process.communicate(timeout=_LIMIT_S)[0] for rank, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return (
        {rank: json.loads(text)["answer"] for rank, text in said.items() if text},
        {rank: process.returncode for rank, process in processes.items()},
    )


def test_ranks_that_never_came_are_named_at_the_first_measurement() -> None:
    answers, codes = _run([0], 3, "missing")
    assert answers == {0: {"ranks": [1, 2], "endpoints": ["n0"]}}
    assert codes == {0: 0}


def test_without_rank_0_every_other_ends_and_names_it() -> None:
    answers, _ = _run([1, 2], 3, "missing")
    for rank in (1, 2):
        assert answers[rank].startswith(f"rank {rank} of 3 (n{rank}) found nobody at 127.0.0.1:")
        assert "within 4 s: start rank 0" in answers[rank]


def test_a_rank_that_dies_in_a_measurement_is_named_and_all_others_end() -> None:
    answers, codes = _run([0, 1, 2], 3, "dying")
    assert answers == {0: {"ranks": [1]}, 2: None}
    assert codes == {0: 0, 1: -signal.SIGKILL, 2: 0}


@requires("mpi")
def test_mpi_measures_the_same_things() -> None:
    program = mpirun()
    assert program is not None
    command = [program, "--allow-run-as-root", "--oversubscribe", "-n", "2", *_LONE_RANK, "0", "2", "from-mpi", "mpi"]
    done = subprocess.run(command, env=_ENVIRONMENT, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    answers = {line["rank"]: line["answer"] for line in map(json.loads, done.stdout.splitlines())}
    assert answers[1] is None
    assert answers[0]["transport"] == "mpi"
    assert all(1e5 < rate < 1e12 for rate in answers[0]["rates"])
    assert all(0 < seconds < 5 for seconds in answers[0]["trips"])
    assert answers[0]["correct"] == [True] * 6
