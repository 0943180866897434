"""The ranks of one run: who this process is, which device is its own, and the few things it says to all others.

This is the one place in `parallel` that reads the environment: `RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT`, as torchrun sets them. Without them a process is a world of its own, with the same interface and no
process group.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from parallel.errors import DeviceError, ParallelError

T = TypeVar("T")
DeviceChoice = Literal["auto", "cpu", "cuda"]
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class RankEnvironment:
    """What a launcher told this process about its place. `address` is `host:port` of the meeting point."""

    rank: int
    world_size: int
    local_rank: int
    address: str


@dataclass(frozen=True, kw_only=True)
class World:
    """All ranks of a run, seen from one of them. Every method but the properties is a collective over ALL ranks.

    `backend` is None and `control_group` is None when this process is alone and no process group exists.
    `control_group` (gloo, CPU tensors) carries Python objects and barriers, so that they never queue behind
    gradients on a GPU.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str | None
    timeout: timedelta
    control_group: dist.ProcessGroup | None
    address: str | None = None
    """Host of the ranks' meeting point, as the launcher gave it: rank 0's, under a name that others reach it by."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that speaks for all: prints, and writes what is written once."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums `tensor` (any shape, on this rank's device) over all ranks, in place, and returns it. No backward."""
        if self.backend is not None:
            with self._naming_the_lost("an all-reduce"):
                dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's `tensor` (of one shape and dtype, on its device), stacked in the order of ranks. No backward."""
        if self.backend is None:
            return tensor[None]
        gathered = tensor.new_empty(self.world_size * tensor.numel())
        with self._naming_the_lost("an all-gather"):
            # torch 2.13 renamed it, and warns the user of the name that 2.11 and 2.12 have alone.
            all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            all_gather(gathered, tensor.contiguous().view(-1))
        return gathered.view(self.world_size, *tensor.shape)

    def broadcast_object(self, value: T | None, *, source: int = 0) -> T:
        """The `value` that rank `source` holds, on every rank. It must be picklable; other ranks' values are ignored."""
        if self.control_group is None:
            return value  # type: ignore[return-value]
        box: list[Any] = [value if self.rank == source else None]
        with self._naming_the_lost("a broadcast"):
            dist.broadcast_object_list(box, src=source, group=self.control_group)
        return box[0]

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's `value` (picklable), in the order of ranks."""
        if self.control_group is None:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        with self._naming_the_lost("an exchange"):
            dist.all_gather_object(gathered, value, group=self.control_group)
        return gathered

    def barrier(self) -> None:
        """Returns once all ranks are here. Raises `ParallelError`, on rank 0 naming who is not, after `timeout`."""
        if self.control_group is not None:
            with self._naming_the_lost("a barrier"):
                dist.monitored_barrier(self.control_group, timeout=self.timeout, wait_all_ranks=True)

    def new_control_group(self) -> dist.ProcessGroup | None:
        """One more gloo group over all ranks, for a thread that must not share `control_group`. A collective."""
        if self.control_group is None:
            return None
        return dist.new_group(backend="gloo", timeout=self.timeout)

    @contextmanager
    def _naming_the_lost(self, where: str) -> Iterator[None]:
        """Turns the transport's error into one line: which rank waited, where, and what to look at."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ParallelError(
                f"rank {self.rank} of {self.world_size} lost the others in {where} ({reason}); "
                "another rank has ended or hangs: look at the ends of the other ranks' logs"
            ) from error


def read_rank_environment(environ: Mapping[str, str]) -> RankEnvironment | None:
    """This process's place as torchrun's variables give it, or None when neither RANK nor WORLD_SIZE is set.

    Raises `ParallelError` when some of the variables are missing or make no sense together.
    """
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return None
    missing = [name for name in _VARIABLES if not environ.get(name)]
    if missing:
        present = [name for name in _VARIABLES if environ.get(name)]
        raise ParallelError(
            f"{', '.join(present)} set in the environment, but not {', '.join(missing)}: "
            "set all five as torchrun does, or none for one process"
        )
    numbers: dict[str, int] = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not environ[name].strip().isdecimal():
            raise ParallelError(f"{name}={environ[name]!r} in the environment is not a whole number >= 0")
        numbers[name] = int(environ[name])
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise ParallelError(
            f"RANK={numbers['RANK']} with WORLD_SIZE={numbers['WORLD_SIZE']}: ranks count from 0 to WORLD_SIZE - 1"
        )
    return RankEnvironment(
        rank=numbers["RANK"],
        world_size=numbers["WORLD_SIZE"],
        local_rank=numbers["LOCAL_RANK"],
        address=f"{environ['MASTER_ADDR']}:{numbers['MASTER_PORT']}",
    )


def choose_device(choice: DeviceChoice, local_rank: int) -> torch.device:
    """The device of this rank: `auto` takes CUDA where there is one. Raises `DeviceError` when there is not enough."""
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError('run.device = "cuda", but torch sees no CUDA device here: use "auto" or "cpu"')
    if local_rank >= torch.cuda.device_count():
        raise DeviceError(
            f"local rank {local_rank} has no device of its own: this machine has {torch.cuda.device_count()} "
            "CUDA device(s); start at most as many ranks on it"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def open_world(
    *, device: DeviceChoice = "auto", timeout_seconds: float = 600.0, rendezvous_timeout_seconds: float = 3600.0
) -> Iterator[World]:
    """Meets the other ranks, yields the world, and closes it.

    A collective: with torchrun's variables in the environment every rank of the run must call it. A rank waits
    `rendezvous_timeout_seconds` for the others to come, and from then on `timeout_seconds` in each collective. Raises
    `ParallelError` when the variables, the device or the other ranks are not there.
    """
    timeout = timedelta(seconds=timeout_seconds)
    environment = read_rank_environment(os.environ)
    if environment is None:
        chosen = choose_device(device, 0)
        yield World(
            rank=0, world_size=1, local_rank=0, device=chosen, backend=None, timeout=timeout, control_group=None
        )  # fmt: skip
        return
    chosen = choose_device(device, environment.local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    store = _hearing_signals(lambda: _meet(environment, timedelta(seconds=rendezvous_timeout_seconds)))
    try:
        store.set_timeout(timeout)
        dist.init_process_group(
            f"cpu:gloo,cuda:{backend}" if backend == "nccl" else "gloo",
            store=dist.PrefixStore("world", store),
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=timeout,
        )
    except (RuntimeError, ValueError) as error:  # torch's store and network errors are RuntimeErrors
        raise _no_meeting(environment, timeout) from error
    failed = True
    try:
        yield World(
            rank=environment.rank,
            world_size=environment.world_size,
            local_rank=environment.local_rank,
            device=chosen,
            backend=backend,
            timeout=timeout,
            control_group=dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else dist.group.WORLD,
            address=environment.address.rpartition(":")[0],
        )
        failed = False
    finally:
        # After a failure NCCL may wait for ranks that are gone; the process is about to end anyway.
        if not (failed and backend == "nccl"):
            dist.destroy_process_group()


def _meet(environment: RankEnvironment, timeout: timedelta) -> dist.Store:
    """The store at the meeting point, once every rank has come there. Raises `ParallelError` when some do not.

    init_process_group has one timeout for this and for every collective after it. Yet ranks may come an hour apart,
    where one host prepares data more slowly than another, and a collective that takes an hour is hung.
    """
    try:
        store, _, world_size = next(rendezvous("env://", environment.rank, environment.world_size, timeout=timeout))
        # torch makes rank 0 alone wait, and under torchrun nobody.
        if store.add("arrived", 1) == world_size:
            store.set("all arrived", "")
        store.wait(["all arrived"], timeout)
    except (RuntimeError, ValueError) as error:
        raise _no_meeting(environment, timeout) from error
    return store


def _hearing_signals(wait: Callable[[], T]) -> T:
    """Calls `wait` in a thread of its own. Native code that waits for other ranks lets no signal handler of Python run in
    its thread, and a rank must be able to stop before the others have come."""
    outcome: list[T | BaseException] = []

    def work() -> None:
        try:
            outcome.append(wait())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, name="rendezvous", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _no_meeting(environment: RankEnvironment, timeout: timedelta) -> ParallelError:
    return ParallelError(
        f"rank {environment.rank} could not meet the others at {environment.address} within "
        f"{timeout.total_seconds():g} s: start all {environment.world_size} ranks, and check that MASTER_ADDR resolves "
        "and its port is reachable; where hosts prepare data for longer, raise parallel.rendezvous_timeout_seconds"
    )
