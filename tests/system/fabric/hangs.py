"""Runs that hang: four gloo ranks on two hosts by name, in a loop of collectives on several groups, one of which does wrong.

What the watch should say is known here alone: it sees the ranks and nothing else.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import numpy as np
import psutil

from cluster.fabric.watch.status import RecordedFinding, status

NUM_RANKS = 4
HANG_FAULTS = ("skipped", "different", "stopped", "killed")
"""Those that a campaign draws."""
HangFault = Literal["skipped", "different", "stopped", "killed", "asleep", "interpreter held", "busy", "none"]
SCHEDULE = (
    ("world", "all_reduce"),
    ("tp", "all_gather"),
    ("dp", "all_reduce"),
    ("tp", "all_reduce"),
    ("dp", "all_to_all"),
    ("world", "all_gather"),
)
"""One step's collectives: axis and operation."""
_GROUPS = {"tp": ((0, 1), (2, 3)), "dp": ((0, 2), (1, 3))}
_START_SECONDS = 90.0
_ORPHAN_SECONDS = 30.0
_STACKS_SECONDS = 60.0
_STEP_SECONDS = 0.02
_NUMEL = 1000


@dataclass(frozen=True, kw_only=True)
class HangCase:
    """What goes wrong: on which rank, in which step, before or in which collective of it."""

    fault: HangFault
    rank: int
    step: int = 30
    slot: int = 0
    steps: int = 10_000
    """After so many the run ends by itself."""
    seconds: float = 120.0
    """How long the rank is asleep or busy."""
    hang_seconds: float = 8.0

    @property
    def kinds(self) -> tuple[str, ...]:
        """What a finding may be called. A rank that skips a collective either stands in another group's while its own
        waits for it, or calls the group's next one under the number of the one that it has skipped."""
        if self.fault == "skipped":
            return "missing_rank", "mismatched_collective"
        return ("mismatched_collective",) if self.fault == "different" else ("missing_rank",)


@dataclass(frozen=True, kw_only=True)
class HangOutcome:
    """What came of it."""

    findings: tuple[RecordedFinding, ...]
    axis: str | None
    """Of the collective that the rank never called, or called wrongly; None where nothing was done wrong."""
    number: int | None
    since: float | None
    """When it happened, in seconds since 1970."""
    stacks: dict[int, str]
    ended: tuple[int, ...]
    """Ranks that ended by themselves."""
    orphans: tuple[int, ...]
    """Processes of the watch that outlived the run by more than `_ORPHAN_SECONDS`."""
    events: str

    @property
    def seconds(self) -> float | None:
        """From the fault to the first finding."""
        return self.findings[0].time - self.since if self.findings and self.since else None


def draw_hang(rng: np.random.Generator, fault: HangFault) -> HangCase:
    """A seeded case."""
    return HangCase(
        fault=fault,
        rank=int(rng.integers(NUM_RANKS)),
        step=int(rng.integers(10, 60)),
        slot=int(rng.integers(len(SCHEDULE))),
    )


def is_named(case: HangCase, outcome: HangOutcome) -> bool:
    """Whether the first finding has the right kind, the right rank alone, and the right collective."""
    if not outcome.findings:
        return False
    found = outcome.findings[0].finding
    place = found.evidence.get("axis"), found.evidence.get("number")
    return found.kind in case.kinds and found.ranks == (case.rank,) and place == (outcome.axis, outcome.number)


def run_hang(case: HangCase, directory: Path, *, patience_s: float = 40.0) -> HangOutcome:
    """Runs the case until the watch has spoken, the run has ended, or `patience_s` seconds after the fault."""
    directory.mkdir(parents=True, exist_ok=True)
    with _ranks(case, directory) as ranks:
        watchers = [child for rank in ranks.processes[::2] for child in psutil.Process(rank.pid or 0).children()]
        assert len(watchers) == 2, "a watcher a host"
        told = ranks.wait_for_fault(_START_SECONDS)
        deadline = time.time() + patience_s
        while time.time() < deadline and not _findings(directory):
            if all(process.exitcode is not None for process in ranks.processes):
                psutil.wait_procs(watchers, timeout=_ORPHAN_SECONDS)  # they have something to say yet
                break
            time.sleep(0.05)  # a file has no event to wait for
        stacks = _stacks(directory, ranks.processes) if _findings(directory) else {}
        ended = tuple(number for number, process in enumerate(ranks.processes) if process.exitcode is not None)
    _, alive = psutil.wait_procs(watchers, timeout=_ORPHAN_SECONDS)
    events = directory / "events.jsonl"
    return HangOutcome(
        findings=_findings(directory),
        axis=told[0] if told else None,
        number=told[1] if told else None,
        since=told[2] if told else None,
        stacks=stacks,
        ended=ended,
        orphans=tuple(process.pid for process in alive),
        events=events.read_text() if events.exists() else "",
    )


def _findings(directory: Path) -> tuple[RecordedFinding, ...]:
    return status(directory).findings if (directory / "fabric" / "watch.json").exists() else ()


def _stacks(directory: Path, processes: list[BaseProcess]) -> dict[int, str]:
    """What each rank left, once each that still runs has left all of it."""
    deadline = time.monotonic() + _STACKS_SECONDS
    while True:
        texts = {}
        for number in range(NUM_RANKS):
            path = directory / "stacks" / f"rank-{number}.txt"
            texts[number] = path.read_text() if path.exists() else ""
        alive = [number for number, process in enumerate(processes) if process.exitcode is None]
        if all(_is_whole(texts[number]) for number in alive) or time.monotonic() > deadline:
            return texts
        time.sleep(0.05)


def _is_whole(text: str) -> bool:
    """Stacks are written line by line, the innermost function first: what runs the loop comes near the end."""
    return text.endswith("\n") and ("in _run_rank" in text or text.startswith("No stacks"))


@dataclass(kw_only=True)
class _Ranks:
    processes: list[BaseProcess] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)

    def wait_for_fault(self, timeout_s: float) -> tuple[str, int, float] | None:
        """(axis, number, moment); None when every rank has ended without."""
        deadline = time.monotonic() + timeout_s
        open_connections = list(self.connections)
        while open_connections:
            ready = wait(open_connections, timeout=max(0.0, deadline - time.monotonic()))
            assert ready, "the fault did not happen"
            for connection in ready:
                try:
                    return connection.recv()
                except EOFError:
                    open_connections.remove(connection)
        return None


@contextmanager
def _ranks(case: HangCase, directory: Path) -> Iterator[_Ranks]:
    """Four ranks that have a watch. At the end they are gone, whatever state they are in."""
    from torch.distributed import TCPStore

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", __name__])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    ranks = _Ranks()
    try:
        for rank in range(NUM_RANKS):
            here, there = context.Pipe()
            process = context.Process(target=_run_rank, args=(rank, case, directory, store.port, there), daemon=True)
            process.start()
            there.close()
            ranks.processes.append(process)
            ranks.connections.append(here)
        for rank, connection in enumerate(ranks.connections):
            assert connection.poll(_START_SECONDS), f"rank {rank} did not start"
            assert connection.recv() == "ready"
        yield ranks
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()
        for connection in ranks.connections:
            connection.close()


def _run_rank(rank: int, case: HangCase, directory: Path, port: int, parent: Connection) -> None:
    import torch
    import torch.distributed as dist

    from cluster.fabric.watch.rank_side import start_watch
    from cluster.fabric.watch.setup import WatchSetup

    with (directory / f"rank-{rank}.log").open("wb") as log:  # what ranks say of one another's end
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=dist.PrefixStore("world", store), rank=rank, world_size=NUM_RANKS)
    groups = {"world": dist.group.WORLD}
    for axis, all_members in _GROUPS.items():
        for members in all_members:
            group = dist.new_group(list(members), group_desc=f"mesh_{axis}")
            if rank in members:
                groups[axis] = group

    def exchange(text: str | None) -> str:  # not by a collective, so that the groups count from one
        if text is not None:
            store.set("meeting", text)
        return store.get("meeting").decode()

    watch = start_watch(
        WatchSetup(
            directory=directory,
            rank=rank,
            world_size=NUM_RANKS,
            local_rank=rank % 2,
            host=f"host-{rank // 2}",
            address="127.0.0.1",
            exchange=exchange,
            hang_seconds=case.hang_seconds,
        )
    )
    parent.send("ready")
    try:
        _loop(rank, case, groups, parent)
    finally:
        watch.close()
    dist.destroy_process_group()
    os._exit(0)  # as ranks of a run end: torch's threads may abort in an interpreter's own end


def _loop(rank: int, case: HangCase, groups: dict[str, object], parent: Connection) -> None:
    numbers: Counter[str] = Counter()
    for step in range(case.steps):
        time.sleep(_STEP_SECONDS)
        for slot, (axis, operation) in enumerate(SCHEDULE):
            numbers[axis] += 1
            if case.fault != "none" and (rank, step, slot) == (case.rank, case.step, case.slot):
                parent.send((axis, numbers[axis], time.time()))
                operation = _do_wrong(case, operation)
                if operation is None:
                    numbers[axis] -= 1
                    continue
            _communicate(operation, groups[axis])


def _do_wrong(case: HangCase, operation: str) -> str | None:
    """What this rank calls in the place of `operation`, if anything."""
    match case.fault:
        case "skipped":
            return None
        case "different":
            return "all_gather" if operation == "all_reduce" else "all_reduce"
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "asleep":
            time.sleep(case.seconds)
        case "interpreter held":
            ctypes.PyDLL(None).usleep(int(case.seconds * 1e6))
        case "busy":
            until = time.monotonic() + case.seconds
            while time.monotonic() < until:
                sum(range(1000))
    return operation


def _communicate(operation: str, group: object) -> None:
    import torch
    import torch.distributed as dist

    size = dist.get_world_size(group)
    values_N = torch.ones(_NUMEL)
    match operation:
        case "all_reduce":
            dist.all_reduce(values_N, group=group)
        case "all_gather":
            dist.all_gather(list(torch.empty(size, _NUMEL)), values_N, group=group)
        case "all_to_all":
            dist.all_to_all_single(torch.empty(_NUMEL), values_N, group=group)
