"""A pool of processes that act as gloo ranks, started once per test session.

Starting an interpreter with torch costs seconds, so a worker serves many tests: each call makes a fresh world out of
the first n workers and closes it again. A call that fails in a way that may leave workers in doubt (a hang, a death)
ends them, and the next call starts new ones.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

MAX_RANKS = 8
_GRACE_SECONDS = 5.0
"""How long the other ranks may go on after one has failed: they may be about to fail with something to say."""
_START_SECONDS = 120.0
_STACKS_SECONDS = 10.0
_STACKS_SIGNAL = signal.SIGRTMIN + 5  # not SIGUSR1: a rank that trains has a handler of its own for that


class RankFailureError(AssertionError):
    """At least one rank raised, died or hung. The message has every rank's own account. `died`: ranks that ended."""

    def __init__(self, message: str, died: tuple[int, ...]) -> None:
        super().__init__(message)
        self.died = died


@dataclass(frozen=True)
class _Task:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    environment: dict[str, str]
    search_path: list[str]
    timeout_s: float


@dataclass(frozen=True)
class _Answer:
    value: Any = None
    failure: str | None = None


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    stacks: Path


class GlooPool:
    """`pool(n, function, *args)` runs `function(world, *args)` on n ranks and returns what each returned, in order.

    `function` must be importable (no lambda or closure), its arguments and result picklable. `world` is an open
    `parallel.world.World`. Raises `RankFailureError` when a rank raises, dies, or is not done after `timeout_s` seconds.
    """

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._directory = tempfile.TemporaryDirectory(prefix="gloo-pool-")

    def __call__(self, num_ranks: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
        from torch.distributed import TCPStore

        if not 1 <= num_ranks <= MAX_RANKS:
            raise ValueError(f"the pool has 1 to {MAX_RANKS} ranks, not {num_ranks}")
        fresh = [self._start(index) for index in range(len(self._workers), num_ranks)]
        for worker in fresh:  # all start at once, and the time-out counts from when they are ready
            if not worker.connection.poll(_START_SECONDS):
                raise RankFailureError(f"{worker.process.name} did not start within {_START_SECONDS:g} s", ())
            worker.connection.recv()
        self._workers += fresh
        # The meeting point lives here, on a port that the kernel chose: no two calls can take the same one.
        meeting_point = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        for rank, worker in enumerate(self._workers[:num_ranks]):
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(meeting_point.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            worker.connection.send(_Task(function, args, environment, list(sys.path), timeout_s))
        return self._collect(num_ranks, timeout_s)

    def close(self) -> None:
        """Ends all workers at once."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()
        self._workers.clear()

    def _start(self, index: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        stacks = Path(self._directory.name) / f"stacks-{index}-{time.monotonic_ns()}.txt"
        process = context.Process(target=_serve, args=(there, str(stacks)), name=f"gloo-rank-{index}", daemon=True)
        with _environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TORCH_CPP_LOG_LEVEL="ERROR"):
            process.start()
        there.close()
        return _Worker(process, here, stacks)

    def _collect(self, num_ranks: int, timeout_s: float) -> list[Any]:
        answers: dict[int, _Answer] = {}
        died: list[int] = []
        deadline = time.monotonic() + timeout_s
        waiting = {worker.connection: rank for rank, worker in enumerate(self._workers[:num_ranks])}
        while waiting and (ready := wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    answers[rank] = connection.recv()
                except (EOFError, ConnectionError):
                    worker = self._workers[rank]
                    worker.process.join()
                    stacks = worker.stacks.read_text()
                    answers[rank] = _Answer(
                        failure=f"died (exit code {worker.process.exitcode})"
                        + (f"; it was here:\n{stacks}" if stacks else "")
                    )
                    died.append(rank)
                if answers[rank].failure is not None:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        for rank, stacks in self._last_stacks(list(waiting.values())).items():
            answers[rank] = _Answer(failure=f"did not end in time; it was here:\n{stacks}")
        failures = {rank: answer.failure for rank, answer in sorted(answers.items()) if answer.failure is not None}
        if waiting or died:
            self.close()
        if failures:
            account = "\n".join(f"--- rank {rank} {failure}" for rank, failure in failures.items())
            raise RankFailureError(f"{len(failures)} of {num_ranks} ranks failed\n{account}", tuple(died))
        return [answers[rank].value for rank in range(num_ranks)]

    def _last_stacks(self, ranks: list[int]) -> dict[int, str]:
        """What all threads of these workers are doing, written by themselves on a signal, even if they are stuck in C code.
        It ends them: that shows when all is written."""
        workers = {rank: self._workers[rank] for rank in ranks}
        for worker in workers.values():  # all before anyone is missed by the others
            os.kill(worker.process.pid, _STACKS_SIGNAL)
        deadline = time.monotonic() + _STACKS_SECONDS
        for worker in workers.values():
            worker.process.join(max(0.0, deadline - time.monotonic()))
        return {rank: worker.stacks.read_text() for rank, worker in workers.items()}


def _serve(connection: Connection, stacks: str) -> None:
    """A worker's life: one task after another, until the pool is gone."""
    import torch

    from parallel.world import open_world

    torch.set_num_threads(1)
    with open(stacks, "w") as file:
        faulthandler.register(_STACKS_SIGNAL, file=file, all_threads=True, chain=True)
        faulthandler.enable(file=file)
        connection.send("ready")
        while True:
            try:
                task: _Task = connection.recv()
            except EOFError:
                return
            sys.path[:] = task.search_path
            try:
                with (
                    _environment(**task.environment),
                    # Sooner than the pool's own limit: a rank that waits in vain should say so itself.
                    open_world(
                        device="cpu",
                        timeout_seconds=0.6 * task.timeout_s,
                        rendezvous_timeout_seconds=0.6 * task.timeout_s,
                    ) as world,
                ):
                    answer = _Answer(value=task.function(world, *task.args))
                _forget_meshes()
                connection.send(answer)
            except BaseException:  # whatever it was, the test must see it
                connection.send(_Answer(failure=f"raised\n{traceback.format_exc()}"))


def _forget_meshes() -> None:
    """torch keeps the results of DTensor operators by mesh, and takes a mesh of the next world for one whose groups are gone."""
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()


@contextlib.contextmanager
def _environment(**values: str) -> Any:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
