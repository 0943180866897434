"""How the ranks of an MPI job learn where rank 0 is: over MPI itself. For `launcher.rank_environment.adopt`."""

from __future__ import annotations

from launcher.errors import ConfigError


def meet_and_stay() -> tuple[str, int]:
    """Host name and a free port of rank 0, on every rank; MPI stays begun, for those that go on to measure over it.

    A collective over all ranks of the MPI job. Raises `cluster.errors.FabricError` where there is no MPI.
    """
    from cluster.fabric.measured.mpi_world import meet

    return meet()


def meet_and_leave() -> tuple[str, int]:
    """The same for ranks that need MPI for nothing else: it ends at once, while all are there.

    Its own end waits for every rank, and so hangs once one of them is lost; without it mpirun takes each end of a rank for a
    failure. A collective over all ranks of the MPI job. Raises ConfigError where there is no MPI, or another one than mpirun's.
    """
    from cluster.errors import FabricError
    from cluster.fabric.measured.mpi_world import leave, load_mpi, meet

    given = "or set MASTER_ADDR and MASTER_PORT (mpirun -x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=29500)"
    try:
        # Every process would find itself to be rank 0, and wait for others that never come.
        is_alone = load_mpi().COMM_WORLD.Get_size() == 1
        found = meet()
    except FabricError as error:
        raise ConfigError(
            f"this is one rank of several, by MPI, and where rank 0 is cannot be asked over MPI: {error}; {given}"
        ) from error
    leave()
    if is_alone:
        raise ConfigError(
            "this is one rank of several, by mpirun, but mpi4py's MPI library knows of one alone: use the mpirun of the library "
            f"that mpi4py loads, {given}"
        )
    return found


def no_meeting() -> tuple[str, int]:
    """For a dry run: nothing is started, and nobody needs to meet."""
    return "", 0
