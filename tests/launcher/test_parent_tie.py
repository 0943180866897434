"""No rank outlives the process that stands by it: torchrun's agent, a daemon of SLURM or MPI."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.requirements import mpirun, requires

_SECONDS = 120.0
# Says which signal its parent's death will send it (0: none), then waits for ever.
_RANK = """
import ctypes, os, signal, sys
from launcher import rank_process
rank_process.enter(os.environ)
number = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(number))
os.write(1, f"rank {os.getpid()} {number.value}\\n".encode())  # at once: other ranks write there too
signal.pause()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "rank.py"
    path.write_text(_RANK)
    return path


@contextlib.contextmanager
def started(command: Sequence[str | Path], num_ranks: int) -> Iterator[tuple[subprocess.Popen[str], dict[int, int]]]:
    """The command, once its ranks have said who they are: the signal that each is tied by, by process id."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    tied: dict[int, int] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            while len(tied) < num_ranks:
                word, *numbers = process.stdout.readline().split() or ["the end"]
                assert word != "the end", f"ended with {process.wait(timeout=_SECONDS)}"
                if word == "rank":
                    tied[int(numbers[0])] = int(numbers[1])
            yield process, tied
        finally:
            process.kill()
            for pid in tied:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def are_gone(pids: Sequence[int]) -> bool:
    members = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            members.append(psutil.Process(pid))
    return not psutil.wait_procs(members, timeout=60.0)[1]


def torchrun(*arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *arguments]


def test_kill_9_of_torchrun_s_agent_leaves_no_worker(script: Path) -> None:
    with started(torchrun(script), 2) as (agent, ranks):
        assert set(ranks.values()) == {signal.SIGKILL}
        agent.kill()
        assert are_gone(list(ranks))


def test_a_worker_outlives_a_script_between_it_and_the_agent(script: Path) -> None:
    shell = f"{sys.executable} {script}; exit $?"
    with started(torchrun("--no-python", "sh", "-c", shell), 2) as (_, ranks):
        assert set(ranks.values()) == {0}


def test_a_worker_whose_agent_has_died_before_it_could_look_ends(tmp_path: Path, script: Path) -> None:
    gate, word = tmp_path / "gate", tmp_path / "word"
    os.mkfifo(gate)
    late = tmp_path / "late.py"
    late.write_text(
        f"import os, sys\nos.write(1, f'rank {{os.getpid()}} 0\\n'.encode())\nopen({str(gate)!r}).read()\n"
        f"sys.stderr = open({str(word)!r}, 'a')\n{_RANK}"
    )
    with started([sys.executable, "-m", "torch.distributed.run", late], 1) as (agent, ranks):
        agent.kill()
        agent.wait(timeout=_SECONDS)
        gate.write_text("")  # returns once the worker reads
        assert are_gone(list(ranks))
        assert "the torchrun agent of this rank is gone" in word.read_text()


@requires("mpi")
def test_kill_9_of_mpirun_leaves_no_rank(script: Path) -> None:
    program = mpirun()
    assert program is not None
    options = ["--allow-run-as-root", "--oversubscribe", "-n", "2"]
    with started([program, *options, sys.executable, script], 2) as (_, ranks):
        assert set(ranks.values()) == {signal.SIGKILL}
        starter = {parent.pid for pid in ranks if (parent := psutil.Process(pid).parent()) is not None}
        assert len(starter) == 1
        os.kill(starter.pop(), signal.SIGKILL)
        assert are_gone(list(ranks))


@pytest.mark.parametrize(
    ("parent", "tie"),
    [
        ({"maps": "/lib/libtorch_cpu.so", "environ": "A=1"}, signal.SIGKILL),
        ({"maps": "/lib/libtorch_cpu.so", "environ": "A=1\0TORCHELASTIC_RUN_ID=7\0"}, 0),
        ({"maps": "/lib/libc.so", "environ": "TORCHELASTIC_RUN_ID=7"}, 0),
        ({"maps": "/lib/libc.so", "environ": "TORCHELASTIC_RUN_ID=6"}, None),
        ({}, 0),  # nobody knows: /proc may be hidden
    ],
)
def test_who_the_parent_of_a_worker_is(tmp_path: Path, parent: dict[str, str], tie: int | None) -> None:
    processes = tmp_path / str(os.getpid())
    processes.mkdir()
    for name, text in parent.items():
        (processes / name).write_text(text)
    assert _tie({"TORCHELASTIC_RUN_ID": "7", "RANK": "0"}, tmp_path) == tie


@pytest.mark.parametrize(("name", "tie"), [("slurmstepd", signal.SIGKILL), ("prted", signal.SIGKILL), ("bash", 0)])
def test_daemons_that_start_ranks(tmp_path: Path, name: str, tie: int) -> None:
    (tmp_path / str(os.getpid())).mkdir()
    (tmp_path / str(os.getpid()) / "comm").write_text(f"{name}\n")
    assert _tie({}, tmp_path) == tie


def _tie(environ: dict[str, str], processes: Path) -> int | None:
    """The signal that a child of this process is tied by; None where it ends instead."""
    code = (
        "import ctypes; from pathlib import Path; from launcher.parent_tie import tie_to_launcher\n"
        f"tie_to_launcher({environ!r}, processes=Path({str(processes)!r}))\n"
        "number = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(number)); print(number.value)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert done.returncode in (0, 1), done.stderr
    return int(done.stdout) if done.returncode == 0 else None
