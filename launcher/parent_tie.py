"""Ties a rank that torchrun, srun or mpirun has started to the process that stands by it on its host: the kernel kills the
rank when that process dies, however it dies. Else the rank would step on unnoticed, beside the one that takes its place.

Only a parent that is known to be such a process counts. A shell or a script in between may die of the signal that asks
the rank to save, and the rank must outlive it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

_PR_SET_PDEATHSIG = 1
_KEEPERS = frozenset(
    {"slurmstepd", "orted", "orterun", "prted", "prterun", "mpirun", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy"}
)
"""Names of the processes by which SLURM, Open MPI, MPICH and Intel MPI start ranks."""
_TORCHRUN = "TORCHELASTIC_RUN_ID"
"""What torchrun sets for its ranks, and not for itself."""


def die_with_parent(parent: int) -> None:
    """From now on the kernel kills this process when `parent`, which must be its parent, dies; at once where it has died."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def tie_to_launcher(environ: Mapping[str, str], *, processes: Path = Path("/proc")) -> None:
    """Ties this process to the agent of torchrun, or to the daemon of SLURM or MPI, whose rank it is; else does nothing.

    A rank of torchrun that finds its agent dead already ends here. `processes`: where the kernel shows them.
    """
    parent = os.getppid()
    if _TORCHRUN in environ and "RANK" in environ:
        kind = _kind_under_torchrun(processes / str(parent), environ)
        if kind == "orphanage":
            print("the torchrun agent of this rank is gone: it ends", file=sys.stderr, flush=True)  # noqa: T201
            os._exit(1)
        if kind == "agent":
            die_with_parent(parent)
    elif _read(processes / str(parent) / "comm").strip() in _KEEPERS:
        die_with_parent(parent)


def _kind_under_torchrun(parent: Path, environ: Mapping[str, str]) -> Literal["agent", "other", "orphanage"]:
    """What a process is to a rank of torchrun: its agent; something in between, or nobody knows; who adopts orphans.

    The agent has loaded torch, which the init of a machine, a container or a user never does.
    """
    started_with = _read(parent / "environ").split("\0")
    if f"{_TORCHRUN}={environ[_TORCHRUN]}" in started_with:
        return "other"  # it came of the rank itself
    maps = _read(parent / "maps")
    # The agent runs under the same name as its ranks, and may be looked at by them; not so the first of all processes.
    if maps == "" and parent.name != "1":
        return "other"
    return "agent" if "libtorch" in maps else "orphanage"


def _read(path: Path) -> str:
    """Empty where this process may not read it, or it is gone."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
