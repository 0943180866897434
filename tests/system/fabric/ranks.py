"""Ranks on the hosts of a made-up fabric, one a host, forked from one process that has imported torch already.

Eight interpreters that import torch take half a minute on two cores; eight forks take none.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

from tests.system.fabric.hosts import FabricOfHosts, Host
from tests.system.fabric.namespaces import enter, favour_this_process

_FIRST_PORT = 29511
"""Each fabric has addresses of its own, so that ports from here on are nobody else's but those of other ranks there."""
_counter = itertools.count()
_PRELOADED = ["torch", "torch.distributed", "numpy", "launcher.cli", __name__]
_GRACE_SECONDS = 5.0
"""How long the other ranks may go on after one has failed: they may be about to fail with something to say."""


class RankFailureError(AssertionError):
    """At least one rank raised, died or was not done in time. The message has every rank's own account."""


@dataclass(frozen=True, kw_only=True)
class HostRank:
    """What the function of a rank is given. `parent` is a connection to the test, for `Ranks.tell` and `hear`."""

    rank: int
    world_size: int
    host: Host
    address: str
    """Host and port where ranks meet."""
    parent: Connection


@dataclass(frozen=True)
class _Outcome:
    value: Any = None
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Task:
    rank: HostRank
    hosts_file: Any
    function: Callable[..., Any]
    args: tuple[Any, ...]
    environment: dict[str, str]
    favoured: bool


class Ranks:
    """A context: `function(host_rank, *args)` runs on every host of `fabric`, within torchrun's variables.

    `function` must be importable (no lambda, no closure), its arguments and result picklable. favoured: run before all
    else on this machine; not for ranks that poll without rest, such as MPI's. Whatever still runs at the end is killed.
    """

    def __init__(
        self,
        fabric: FabricOfHosts,
        function: Callable[..., Any],
        *args: Any,
        environment: dict[str, str] | None = None,
        favoured: bool = True,
        hosts: Sequence[Host] | None = None,
    ) -> None:
        self._fabric = fabric
        self.hosts = tuple(hosts or fabric.hosts)
        self._make_task = functools.partial(
            _Task,
            hosts_file=fabric.hosts_file,
            function=function,
            args=args,
            environment=environment or {},
            favoured=favoured,
        )
        self._processes: list[BaseProcess] = []
        self._results: list[Connection] = []
        self._channels: list[Connection] = []

    def __enter__(self) -> Self:
        context = _zygote()
        address = f"{self.hosts[0].address}:{_FIRST_PORT + next(_counter) % 1000}"
        for number, host in enumerate(self.hosts):
            result, result_there = context.Pipe(duplex=False)
            channel, channel_there = context.Pipe()
            rank = HostRank(rank=number, world_size=len(self.hosts), host=host, address=address, parent=channel_there)
            process = context.Process(
                target=_run, args=(self._make_task(rank=rank), result_there), name=f"rank-{number}", daemon=True
            )
            process.start()
            result_there.close()
            channel_there.close()
            self._processes.append(process)
            self._results.append(result)
            self._channels.append(channel)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in (*self._results, *self._channels):
            connection.close()

    def process_id(self, host: Host) -> int:
        """Of the rank on `host`."""
        process_id = self._processes[self.hosts.index(host)].pid
        assert process_id is not None
        return process_id

    def stop(self, host: Host) -> None:
        """SIGSTOP, as a machine that hangs."""
        os.kill(self.process_id(host), signal.SIGSTOP)

    def kill(self, host: Host) -> None:
        """SIGKILL, as a machine that is gone."""
        os.kill(self.process_id(host), signal.SIGKILL)

    def ask(self, rank: int, question: Any, *, timeout_s: float) -> Any:
        """`tell` and `hear`."""
        self.tell(rank, question)
        return self.hear(rank, timeout_s=timeout_s)

    def tell(self, rank: int, message: Any) -> None:
        """Sends something to the rank's `parent`."""
        self._channels[rank].send(message)

    def hear(self, rank: int, *, timeout_s: float) -> Any:
        """What the rank sends to its `parent`. Raises RankFailureError where it fails or says nothing."""
        channel, result = self._channels[rank], self._results[rank]
        ready = wait([channel, result], timeout=timeout_s)
        if channel in ready:
            with contextlib.suppress(EOFError):
                return channel.recv()
        account = self._outcome(rank).failure if result in ready else f"said nothing for {timeout_s:g} s"
        raise RankFailureError(f"rank {rank} {account or 'ended without an answer'}")

    def results(self, *, timeout_s: float, of: Sequence[int] | None = None) -> list[Any]:
        """What the function returned on ranks `of` (on all), in order. Raises RankFailureError."""
        expected = list(of if of is not None else range(len(self.hosts)))
        waiting: dict[Any, int] = {self._results[rank]: rank for rank in expected}
        outcomes: dict[int, _Outcome] = {}
        deadline = time.monotonic() + timeout_s
        while waiting and (ready := wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                rank = waiting.pop(connection)
                outcomes[rank] = self._outcome(rank)
                if outcomes[rank].failure is not None:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        for rank in waiting.values():
            outcomes[rank] = _Outcome(failure="was not done in time")
        failures = {rank: outcome.failure for rank, outcome in sorted(outcomes.items()) if outcome.failure}
        if failures:
            account = "\n".join(f"--- rank {rank} {failure}" for rank, failure in failures.items())
            raise RankFailureError(f"{len(failures)} of {len(expected)} ranks failed\n{account}")
        return [outcomes[rank].value for rank in expected]

    def exit_codes(self, *, timeout_s: float) -> list[int]:
        """Of all ranks, where the function ends its process itself. Raises RankFailureError for one that does not."""
        deadline = time.monotonic() + timeout_s
        codes = []
        for rank, process in enumerate(self._processes):
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                raise RankFailureError(f"rank {rank} did not end in {timeout_s:g} s")
            codes.append(process.exitcode)
        return codes

    def _outcome(self, rank: int) -> _Outcome:
        try:
            return self._results[rank].recv()
        except (EOFError, ConnectionError):
            self._processes[rank].join()
            return _Outcome(failure=f"died (exit code {self._processes[rank].exitcode})")


@functools.cache
def _zygote() -> multiprocessing.context.ForkServerContext:
    """A process without threads that has imported what ranks need. It ends with this one."""
    before = {name: os.environ.get(name) for name in _ZYGOTE_ENVIRONMENT}
    os.environ.update(_ZYGOTE_ENVIRONMENT)
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        first = context.Process(target=_nothing)
        first.start()  # starts the server, which keeps the environment of this moment
        first.join()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


_ZYGOTE_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def _nothing() -> None:
    return


def _run(task: _Task, result: Connection) -> None:
    try:
        rank = task.rank
        enter(rank.host, task.hosts_file)
        master, port = rank.address.split(":")
        os.environ |= {
            "RANK": str(rank.rank),
            "WORLD_SIZE": str(rank.world_size),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": master,
            "MASTER_PORT": port,
            **task.environment,
        }
        if task.favoured:
            favour_this_process()
        result.send(_Outcome(value=task.function(rank, *task.args)))
    except BaseException:  # whatever it was, the test must see it
        result.send(_Outcome(failure=f"raised\n{traceback.format_exc()}"))
