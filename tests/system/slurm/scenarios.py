"""Faults of a launched run, each injected into real processes, daemons, links and disks."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.system.slurm.cluster import SlurmOfHosts
from tests.system.slurm.launched import EVERY_STEPS, LaunchedRun

_FAULT_STEP = 2 * EVERY_STEPS + 3
_STOPPED_SECONDS = 1.0
"""So long one rank stands still before the others are all in a collective, waiting for it."""

_SLOW_MBIT = 20.0


@dataclass(frozen=True, kw_only=True)
class Harm:
    """What was done to a run."""

    at: float
    """Seconds since 1970."""
    host: str | None = None
    """Where, if it was one host that was harmed."""
    rank: int | None = None
    """Who, if it was one rank that was harmed."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One kind of fault, and what the run may show of it afterwards."""

    inject: Callable[[LaunchedRun], Harm]
    """Waits for its moment, then does the harm, and mends what only a person could mend."""
    failures: Sequence[str] = ()
    """Kinds of `failure` events of which the first must be one, on the host that was harmed; none: nothing may fail."""
    signal: str | None = None
    """What the first failure must name as the signal that ended the rank."""
    in_collective: bool = False
    """Whether the first failure must name the collective that the ranks were in."""
    requeues: Sequence[str] = ()
    """Reasons of the launcher's own requeues that must be, in order."""
    starts: int = 1
    """How often SLURM must have started the job at least: a lost host may need another start besides."""
    repeats: bool = False
    """Whether the last requeue, and a start with it, may come again: SLURM looks at limits twice a minute, and where it is
    unlucky or busy a start ends before the run does."""
    settings: tuple[str, ...] = ()
    small_disk: bool = False
    """The run is written to a disk of its own, which can be filled."""
    restarts: range = range(1, 3)
    """How many; one, or two where a busy machine seems to have lost a host besides."""
    same_layout: bool = True
    """Whether it ends with as many ranks as it began with: then the last bit of every figure must be the same."""
    most_lost: int = EVERY_STEPS
    """Steps. Who is killed in a save loses what was trained since the checkpoint before it."""


def _kill_rank_in_a_step(run: LaunchedRun) -> Harm:
    run.wait_for_step(_FAULT_STEP)
    host = _host(run, 2)
    harmed_at = time.time()
    run.ranks()[2].kill()
    return Harm(at=harmed_at, host=host, rank=2)


def _kill_rank_in_a_collective(run: LaunchedRun) -> Harm:
    run.wait_for_step(_FAULT_STEP)
    host, ranks = _host(run, 2), run.ranks()
    ranks[1].suspend()
    time.sleep(_STOPPED_SECONDS)  # a part of the fault: meanwhile all others come into the collective
    harmed_at = time.time()
    ranks[2].kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        ranks[1].resume()
    return Harm(at=harmed_at, host=host, rank=2)


def _kill_rank_in_a_save(run: LaunchedRun) -> Harm:
    run.wait_until(lambda: any(run.directory.checkpoints.glob("step-*")), what="the first checkpoint")
    host, ranks = _host(run, 0), run.ranks()
    run.wait_until(lambda: any(run.directory.checkpoints.glob(".partial-*")), what="a save")
    harmed_at = time.time()
    ranks[0].kill()
    return Harm(at=harmed_at, host=host, rank=0)


def _kill_agent(run: LaunchedRun) -> Harm:
    run.wait_for_step(_FAULT_STEP)
    host = _host(run, 2)
    harmed_at = time.time()
    run.agents()[host].kill()
    return Harm(at=harmed_at, host=host)


def _lose_host(run: LaunchedRun) -> Harm:
    run.wait_for_step(_FAULT_STEP)
    host = _host(run, 2)
    harmed_at = time.time()
    run.cluster.kill_host(host)
    return Harm(at=harmed_at, host=host)


def _lose_rendezvous_host(run: LaunchedRun) -> Harm:
    """The first host has rank 0, at which all others meet, and the supervisor."""
    run.wait_for_step(_FAULT_STEP)
    host = _host(run, 0)
    harmed_at = time.time()
    run.cluster.kill_host(host)
    return Harm(at=harmed_at, host=host)


def _stop_rank(run: LaunchedRun) -> Harm:
    run.wait_for_step(_FAULT_STEP)
    host = _host(run, 1)
    harmed_at = time.time()
    run.ranks()[1].suspend()
    return Harm(at=harmed_at, host=host, rank=1)


def _link_down(seconds: float) -> Callable[[LaunchedRun], Harm]:
    def inject(run: LaunchedRun) -> Harm:
        run.wait_for_step(_FAULT_STEP)
        host = _host(run, 2)
        harmed_at = time.time()
        run.cluster.link_down(host)
        time.sleep(seconds)  # the fault itself
        run.cluster.link_up(host)
        return Harm(at=harmed_at, host=host)

    return inject


def _preempt(run: LaunchedRun) -> Harm:
    run.wait_for_step(_FAULT_STEP)
    others = ["--partition=high", f"--nodes={len(run.cluster.names)}", "--exclusive", "--time=1"]
    job = run.cluster.submit("sleep", "1", options=others)
    harmed_at = time.time()
    run.cluster.wait_for(job, ("COMPLETED", "FAILED"), 90)
    return Harm(at=harmed_at)


def _reach_time_limit(run: LaunchedRun) -> Harm:
    """SLURM knows no limit below a minute: a slow network makes the steps last until the signal comes."""
    for name in run.cluster.names:
        run.cluster.set_rate(name, _SLOW_MBIT)
    run.wait_until(lambda: bool(run.events("stop_asked")), what="the time limit's signal")
    harmed_at = time.time()
    for name in run.cluster.names:
        run.cluster.set_rate(name)
    return Harm(at=harmed_at)


def _requeue(run: LaunchedRun) -> Harm:
    run.wait_for_step(_FAULT_STEP)
    record = run.folder.read_record()
    assert record is not None
    assert record.job_id is not None
    harmed_at = time.time()
    run.cluster.run("scontrol", "requeue", record.job_id)
    return Harm(at=harmed_at)


def _fill_disk(run: LaunchedRun) -> Harm:
    """Not a byte is left, for the run's records neither, until the ranks have failed."""
    run.wait_for_step(EVERY_STEPS + 1)
    ranks = run.ranks()
    ballast = run.directory.root.parent / "ballast"
    harmed_at = time.time()
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    _, alive = psutil.wait_procs(ranks.values(), timeout=60)
    ballast.unlink()
    assert not alive, run.account()
    return Harm(at=harmed_at)


def _corrupt_newest_checkpoint(run: LaunchedRun) -> Harm:
    run.wait_for_step(_FAULT_STEP)
    run.wait_until(lambda: run.directory.checkpoints.joinpath(f"step-{2 * EVERY_STEPS:08d}").is_dir(), what="a save")
    host, ranks = _host(run, 3), run.ranks()
    newest = max(run.directory.checkpoints.glob("step-*"))
    largest = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        file.write(b"harmed")
    harmed_at = time.time()
    ranks[3].kill()
    return Harm(at=harmed_at, host=host, rank=3)


def _host(run: LaunchedRun, rank: int) -> str:
    state = run.state()
    assert state is not None
    return state.hosts[rank]


SCENARIOS: dict[str, Scenario] = {
    "rank killed in a step": Scenario(inject=_kill_rank_in_a_step, failures=("signal",), signal="SIGKILL"),
    "rank killed in a collective": Scenario(
        inject=_kill_rank_in_a_collective, failures=("signal",), signal="SIGKILL", in_collective=True
    ),
    "rank killed in a save": Scenario(
        inject=_kill_rank_in_a_save, failures=("signal",), signal="SIGKILL", most_lost=2 * EVERY_STEPS
    ),
    "agent killed": Scenario(inject=_kill_agent, failures=("host_lost",)),
    "host lost": Scenario(inject=_lose_host, failures=("host_lost",), settings=("slurm.nodes=5",)),
    "host lost without a spare": Scenario(
        inject=_lose_host, failures=("host_lost",), settings=("launch.min_nodes=2",), same_layout=False
    ),
    "rendezvous host lost": Scenario(inject=_lose_rendezvous_host, requeues=("host_lost",), starts=2),
    "rank stopped": Scenario(inject=_stop_rank, failures=("hang",), in_collective=True),
    "link down for 5 s": Scenario(inject=_link_down(5.0), failures=("hang", "host_lost"), restarts=range(2)),
    "link down for 60 s": Scenario(inject=_link_down(60.0), failures=("hang", "host_lost"), restarts=range(1, 4)),
    "preemption": Scenario(inject=_preempt, requeues=("preemption",), starts=2),
    "time limit": Scenario(
        inject=_reach_time_limit,
        requeues=("time_limit",),
        settings=("slurm.time=1", "slurm.signal_seconds=35"),
        starts=2,
        repeats=True,
    ),
    "requeue by the admin": Scenario(inject=_requeue, starts=2),
    "disk full in a save": Scenario(
        inject=_fill_disk,
        failures=("exception", "exit"),
        settings=("launch.preflight.min_free_disk_gb=0",),
        small_disk=True,
        restarts=range(1, 3),
        most_lost=2 * EVERY_STEPS,
    ),
    "newest checkpoint corrupt": Scenario(
        inject=_corrupt_newest_checkpoint, failures=("signal",), signal="SIGKILL", most_lost=2 * EVERY_STEPS
    ),
}


@contextlib.contextmanager
def small_disk(path: Path, *, megabytes: int = 48) -> Iterator[Path]:
    """A file system of its own at `path`. Must be there before the hosts are: they see what was mounted then."""
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)], check=True, timeout=30)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True, timeout=30)


def mend(cluster: SlurmOfHosts) -> None:
    """All hosts in good order again, whatever a scenario has done to them."""
    for name in cluster.names:
        cluster.link_up(name)
        cluster.set_rate(name)
        if not any(process.name() == "slurmd" for process in cluster.processes(name)):
            cluster.revive_host(name)
        for process in cluster.processes(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
    for name in cluster.names:
        cluster.wait_for_node(name, "IDLE", 60)
