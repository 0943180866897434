"""One rank in a process of its own, for tests in which ranks never come, die, or are MPI's: `RANK SIZE ADDRESS WHAT`."""

from __future__ import annotations

import json
import os
import signal
import sys
from itertools import count

import numpy as np

from cluster.errors import FabricError
from cluster.fabric.measured.fabric import MeasuredFabric, run_on_fabric
from cluster.fabric.measured.place import FabricPlace, MeasureOptions
from cluster.fabric.measured.transport import COLLECTIVE_KINDS
from cluster.fabric.probing import UnresponsiveError


def _measure(fabric: MeasuredFabric) -> object:
    try:
        return (fabric.compute([0], work_s=0.01) > 0).tolist()
    except UnresponsiveError as error:
        return {"ranks": error.ranks, "endpoints": [endpoint.host for endpoint in fabric.endpoints]}


def _measure_all(fabric: MeasuredFabric) -> object:
    pair = np.array([[0, 1], [1, 0]])
    everybody = [list(range(fabric.world_size))]
    return {
        "transport": fabric.transport,
        "rates": fabric.transfer(pair, num_bytes=1 << 20).tolist(),
        "trips": fabric.round_trip(pair, repeats=5).tolist(),
        "correct": [
            fabric.collective(kind, 4096, everybody, iterations=2, warmup=1).correct for kind in COLLECTIVE_KINDS
        ],
    }


def _rank_1_dies(fabric: MeasuredFabric) -> object:
    try:
        for _ in range(1000):
            fabric.round_trip(np.array([[0, 1], [2, 1]]), repeats=50)
    except UnresponsiveError as error:
        return {"ranks": error.ranks}
    return "nobody died"


def _die_in_the_middle() -> None:
    """Makes this rank kill itself at its hundredth message."""
    from cluster.fabric.measured.stamps import Stamps

    stamp, seen = Stamps.stamp, count(1)

    def last_stamp(self: Stamps) -> None:
        if next(seen) == 100:
            os.kill(os.getpid(), signal.SIGKILL)
        stamp(self)

    Stamps.stamp = last_stamp  # type: ignore[method-assign]


def main() -> None:
    rank, size, address, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    if what == "mpi":
        from cluster.fabric.measured.mpi_world import load_mpi, meet

        rank, size = load_mpi().COMM_WORLD.Get_rank(), load_mpi().COMM_WORLD.Get_size()
        address = "127.0.0.1:" + str(meet()[1])
    options = MeasureOptions(
        transport="mpi" if what == "mpi" else "gloo",
        start_timeout_s=4.0 if what == "missing" else 100.0,
        silence_s=4.0,
        round_timeout_s=20.0,
    )
    place = FabricPlace(rank=rank, world_size=size, local_rank=0, local_world_size=1, address=address, host=f"n{rank}")
    if what == "dying" and rank == 1:
        _die_in_the_middle()
    work = {"missing": _measure, "mpi": _measure_all, "dying": _rank_1_dies}[what]
    try:
        answer: object = run_on_fabric(place, options, work)
    except FabricError as error:
        answer = str(error)
    print(json.dumps({"rank": rank, "answer": answer}), flush=True)


if __name__ == "__main__":
    main()
