"""Durations of this rank's collectives on NCCL, from torch's flight recorder: the GPU's own clock, without stopping the step.

A collective's time on a GPU begins when its kernel starts, and a kernel waits inside for the other ranks, so the late rank
has the shortest duration here too. What is in flight beside computing is not told apart from standing still.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Mapping
from time import perf_counter, time_ns
from typing import Any

from cluster.fabric.monitor.durations import Record, TappedStep

_BYTES = {
    "Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
    "Float8_e4m3fn": 1, "Float8_e5m2": 1,
}  # fmt: skip
_KINDS = {
    "allreduce": "all_reduce", "_all_gather_base": "all_gather", "_allgather_base": "all_gather",
    "_reduce_scatter_base": "reduce_scatter", "all_to_allv": "all_to_all", "alltoall": "all_to_all",
}  # fmt: skip


class FlightDurations:
    """A `DurationSource` for NCCL. `enable` must have been called for the groups that it shall see."""

    knows_waits = False

    def __init__(self) -> None:
        self._since_ns = 0

    def start(self) -> None:
        """See `DurationSource`."""
        self._since_ns = time_ns()

    def stop(self) -> TappedStep:
        """See `DurationSource`. What has not ended by now has no duration."""
        entered = perf_counter()
        records = records_of(_entries(), self._since_ns, time_ns())
        return TappedStep(records=tuple(records), cost_s=perf_counter() - entered)


def enable() -> tuple[str, ...]:
    """Has every NCCL group of this process that exists now time its collectives: two events on the GPU for each.

    Returns the names of those that cannot: a group with gloo for the CPU beside NCCL asks both, and gloo refuses.
    """
    import torch.distributed as dist

    untimed = []
    for group in list(dist.distributed_c10d._world.pg_map):
        if "nccl" not in dist.get_backend(group):
            continue
        try:
            group._enable_collectives_timing()  # type: ignore[attr-defined]
        except Exception:
            untimed.append(group.group_desc or group.group_name)
    return tuple(untimed)


def records_of(entries: Iterable[Mapping[str, Any]], since_ns: int, until_ns: int) -> list[Record]:
    """Entries of the flight recorder that were made between two times (nanoseconds since 1970), in their order."""
    return [_record(entry) for entry in entries if since_ns <= entry["time_created_ns"] < until_ns]


def _record(entry: Mapping[str, Any]) -> Record:
    name = entry["profiling_name"].partition(":")[2].split(" ")[0]
    kind = _KINDS.get(name, name)
    side = "output" if kind == "all_gather" else "input"
    sizes, dtypes = entry[f"{side}_sizes"], entry[f"{side}_dtypes"]
    took = entry.get("duration_ms")
    return Record(
        group=entry["process_group"][0],
        kind=kind,
        num_bytes=sum(math.prod(size) * _BYTES.get(dtype, 4) for size, dtype in zip(sizes, dtypes, strict=False)),
        started=entry["time_created_ns"] / 1e9,
        seconds=None if took is None else took / 1e3,
    )


def _entries() -> list[dict[str, Any]]:
    from torch._C import _distributed_c10d as c10d

    dump = getattr(c10d, "_dump_nccl_trace", None) or getattr(c10d, "_dump_fr_trace", None)
    return pickle.loads(dump(includeStackTraces=False)).get("entries", []) if dump else []
