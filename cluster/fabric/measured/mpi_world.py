"""The ranks of an MPI job: that MPI is there, where rank 0 is, and an end in good order. The one importer of mpi4py.

Imports without torch: a rank that only asks where rank 0 is goes on to read its configuration.
"""

from __future__ import annotations

import socket
import sys
from typing import Any

from cluster.errors import FabricError


def load_mpi() -> Any:
    """mpi4py's MPI module, initialised. Raises FabricError where it, or an MPI library, is not installed."""
    try:
        import mpi4py

        # Its own end waits for all ranks, also for those that are lost; `leave` ends it where all are there.
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise FabricError(
            f"MPI needs mpi4py and an MPI library ({error}): install the extra `mpi`, and start the ranks "
            "with mpirun or srun --mpi"
        ) from error
    return MPI


def meet() -> tuple[str, int]:
    """Host name and a free port of rank 0, on every rank. A collective over all ranks of the MPI job. Raises FabricError."""
    world = load_mpi().COMM_WORLD
    found: tuple[str, int] | None = None
    if world.Get_rank() == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            found = (socket.gethostname(), probe.getsockname()[1])
    agreed: tuple[str, int] = world.bcast(found, root=0)
    return agreed


def leave() -> None:
    """Ends MPI, where this process has begun it. Every rank of the MPI job must come: it waits for them, and lets no other
    thread of Python run meanwhile. Without it mpirun takes the end of a rank for a failure."""
    if "mpi4py.MPI" in sys.modules and not load_mpi().Is_finalized():
        load_mpi().Finalize()
