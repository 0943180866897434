"""What the supervisor of a job needs of whoever starts processes on hosts: this machine, torchrun, SLURM, MPI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class AgentsStart:
    """One start of agents, for one attempt."""

    hosts: Sequence[str]
    """Each gets its agents. Names as `Backend.hosts` gives them."""
    agents_per_host: int
    """1, or the ranks of a host where the backend wants one task a rank."""
    environ: Mapping[str, str]
    """Added to the agents' environment: where the head is, its token, the attempt."""
    output: Path
    """File that takes what the starter (srun, mpirun) and the agents print themselves."""


class Agents(Protocol):
    """Agents that have been started, as far as their starter tells."""

    async def wait(self) -> int:
        """Until the starter has ended; its exit code."""
        ...

    async def end(self) -> None:
        """Makes sure that nothing of this start is left, as far as hosts can be reached: asks, then kills, within seconds.
        Returns once the starter has ended. May be called after `wait` has returned, and twice."""
        ...


class Backend(Protocol):
    """Starts agents (`mega agent`) on hosts."""

    @property
    def name(self) -> str:
        """local, torchrun, slurm or mpi."""
        ...

    @property
    def task_per_rank(self) -> bool:
        """Whether each rank has an agent of its own, rather than each host one."""
        ...

    @property
    def is_restart(self) -> bool:
        """Whether this very job was under way before, and goes on without its user: its scheduler has started it again, or
        another host has taken it over."""
        ...

    async def hosts(self) -> Sequence[str]:
        """Hosts that could take part now, in the order of their ranks; those that are down are left out."""
        ...

    async def possible_hosts(self) -> Sequence[str]:
        """Hosts that could be there, now or later in this start of the job: those that are down now too. Who is not among
        them does not come back. Raises `launcher.errors.RunError` where that is not known now."""
        ...

    async def start(self, start: AgentsStart) -> Agents:
        """Raises `launcher.errors.RunError` where nothing could be started."""
        ...

    async def requeue(self, *, without: Sequence[str], reason: str) -> bool:
        """Asks for another start of the whole job, on other hosts than `without`. False where this backend has no queue, or the
        queue says no; then the job ends. Raises `launcher.errors.RunError` where it does not answer now: it is asked again."""
        ...

    async def ends_at(self) -> float | None:
        """Once a stop was asked: when the scheduler ends the job by force, in seconds since 1970; inf where it does and does
        not say when, None where there is none that would. Raises `launcher.errors.RunError` where it does not answer now."""
        ...

    async def is_preempted(self) -> bool:
        """After a SIGTERM: whether the scheduler wants the hosts back, and so the job should go on later. Raises
        `launcher.errors.RunError` where it does not answer now: it is asked again."""
        ...
