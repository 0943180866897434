"""Our measurements over MPI beside OSU-style ones, in turn between the same two ranks, over TCP on the loopback interface.

    python benchmarks/fabric_mpi.py

Ping-pong is `mpi4py.bench pingpong` (as osu_latency: half of a round trip). Streaming and all-reduce are loops as in osu_bw (a
window of messages, then one answer) and osu_allreduce (a barrier, then one all-reduce that is timed). A round is a short block
of one and a short block of the other, in random order. Each block tells a median; what counts is the best tenth of the blocks,
since a block in which another program held a core tells of that program. The medians over all blocks stand beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from reporting import add_output_options, report

BOUND = 0.10
TIMEOUT_S = 60.0
PING_PONG_BYTES = (8, 1024, 8192, 65536, 1 << 20)
STREAM_BYTES = (1 << 20, 8 << 20)
ALL_REDUCE_BYTES = (1024, 65536, 1 << 20)
WINDOW = 16
SEED = 5


@dataclass(frozen=True)
class Pair:
    """The same figure by two ways. Every rank calls both; rank 0's results count."""

    name: str
    unit: str
    ours: Callable[[], float]
    theirs: Callable[[], float]
    bounded: bool = False
    """Both measure the same thing, and must agree."""


def main() -> int:
    """Starts the two ranks and reports what rank 0 measured; or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="pairs of blocks of each figure")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    add_output_options(parser)
    options = parser.parse_args()
    if options.as_rank:
        return measure(options.rounds)
    rows = json.loads(start_ranks(options.rounds))
    summary = {
        row["name"]: f"ours {row['ours']:.4g} {row['unit']}, OSU-style {row['theirs']:.4g}, ratio {row['ratio']:.3f}"
        for row in rows
    }
    met = all(abs(row["ratio"] - 1) <= BOUND for row in rows if row["bounded"])
    return report(Path(__file__).stem, {"bound": BOUND, "rows": rows, "summary": summary, "met": met}, options)


def start_ranks(rounds: int) -> str:
    """What rank 0 of two ranks under mpirun prints."""
    mpirun = Path(sys.executable).with_name("mpirun")
    command = [str(mpirun if mpirun.exists() else "mpirun"), "-n", "2", "--oversubscribe"]
    command += ["--mca", "pml", "ob1", "--mca", "btl", "self,tcp", "--mca", "btl_tcp_if_include", "lo"]
    command += [sys.executable, __file__, "--as-rank", "--rounds", str(rounds)]
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=os.environ | allowed, capture_output=True, text=True, timeout=30 * TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        sys.exit(f"the ranks failed:\n{done.stderr}")
    return done.stdout


def measure(rounds: int) -> int:
    """One rank: all figures by both ways."""
    import torch
    from mpi4py import MPI

    from cluster.fabric.measured.compute import Workpiece
    from cluster.fabric.measured.mpi_transport import MpiTransport

    comm = MPI.COMM_WORLD
    transport = MpiTransport(comm.rank, comm.size, Workpiece(torch.device("cpu")))
    order = random.Random(SEED)  # the same on both ranks
    pairs = [ping_pong(transport, comm, size) for size in PING_PONG_BYTES]
    pairs += [stream(transport, comm, size) for size in STREAM_BYTES]
    pairs += [all_reduce(transport, comm, size) for size in ALL_REDUCE_BYTES]
    rows = []
    for pair in pairs:
        found: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(rounds):
            for way in order.sample(["ours", "theirs"], 2):
                comm.Barrier()
                found[way].append(getattr(pair, way)())
        best = 0.9 if pair.unit == "MB/s" else 0.1
        ours, theirs = (float(np.quantile(found[way], best)) for way in ("ours", "theirs"))
        medians = {f"median_{way}": statistics.median(found[way]) for way in found}
        row = {"name": pair.name, "unit": pair.unit, "ours": ours, "theirs": theirs, "ratio": ours / theirs, **medians}
        rows.append({**row, "bounded": pair.bounded})
    if comm.rank == 0:
        print(json.dumps(rows), flush=True)
    transport.close(clean=True)
    return 0


def ping_pong(transport: Any, comm: Any, size: int) -> Pair:
    """Microseconds of a message one way: half of there and back."""
    from mpi4py.bench import pingpong

    from cluster.fabric.measured.transport import Flow

    loop = 20
    flows = [Flow(index=0, sender=0, receiver=1)]
    arguments = ["--min-size", str(size), "--max-size", str(size), "--skip", "5", "--loop", str(loop)]
    arguments += ["--loop-large", str(loop), "--loop-huge", str(loop)]

    def ours() -> float:
        medians = transport.round_trip(flows, num_bytes=size, repeats=loop, timeout_s=TIMEOUT_S)
        return medians[0] / 2 * 1e6 if comm.rank == 0 else 0.0

    def theirs() -> float:
        # It tells the mean of its iterations. Where other programs run, that is mostly a mean of how long they ran; and the
        # two ways must be compared by one statistic.
        with unittest.mock.patch("statistics.mean", statistics.median):
            ((_, median_s, _),) = pingpong(comm, arguments, verbose=False)
        return median_s * 1e6

    return Pair(f"ping-pong of {size} bytes", "us", ours, theirs, bounded=True)


def stream(transport: Any, comm: Any, size: int) -> Pair:
    """MB/s of many messages one way: of a train of chunks, and of a window as in osu_bw."""
    from mpi4py import MPI

    from cluster.fabric.measured.trains import plan_train
    from cluster.fabric.measured.transport import Flow

    total = WINDOW * size
    train = plan_train(total)
    buffers = [np.zeros(size, np.uint8) for _ in range(WINDOW)]
    flows = [Flow(index=0, sender=1, receiver=0)]  # rank 0 receives, and so knows the rate

    def ours() -> float:
        rates = transport.transfer(flows, train, timeout_s=TIMEOUT_S).rates
        return rates[0] / 1e6 if comm.rank == 0 else 0.0

    def theirs() -> float:
        answer = np.zeros(1, np.uint8)
        for timed in (False, True):
            start = time.perf_counter()
            if comm.rank == 1:
                MPI.Request.Waitall([comm.Isend(buffer, 0) for buffer in buffers])
                comm.Recv(answer, 0)
            else:
                MPI.Request.Waitall([comm.Irecv(buffer, 1) for buffer in buffers])
                comm.Send(answer, 1)
            seconds = time.perf_counter() - start
            if not timed:
                comm.Barrier()
        return total / seconds / 1e6

    return Pair(f"stream of {WINDOW} x {size} bytes", "MB/s", ours, theirs)


def all_reduce(transport: Any, comm: Any, size: int) -> Pair:
    """Microseconds of an all-reduce of float32, the mean over both ranks."""
    from mpi4py import MPI

    from cluster.fabric.measured.transport import CollectiveCall

    iterations = 20
    call = CollectiveCall(
        kind="all_reduce",
        num_bytes=size,
        group=(0, 1),
        iterations=iterations,
        warmup=3,
        dtype="float32",
        with_compute=False,
        check=False,
    )
    source, result = np.ones(size // 4, np.float32), np.empty(size // 4, np.float32)

    def ours() -> float:
        seconds = transport.collective(call, timeout_s=TIMEOUT_S).seconds
        return comm.allreduce(statistics.median(seconds)) / comm.size * 1e6

    def theirs() -> float:
        seconds = []
        for _ in range(iterations + 3):
            comm.Barrier()
            start = time.perf_counter()
            comm.Allreduce(source, result, MPI.SUM)
            seconds.append(time.perf_counter() - start)
        return comm.allreduce(statistics.median(seconds[3:])) / comm.size * 1e6

    return Pair(f"all-reduce of {size} bytes", "us", ours, theirs)


if __name__ == "__main__":
    sys.exit(main())
