"""What this process's flight recorder of torch tells: which collectives it called, on which group, and which are done.

The one place that knows torch's records. There are two recorders: one for NCCL (`_dump_nccl_trace`, in builds with NCCL) and,
from torch 2.13 on, one for gloo (`_dump_fr_trace`), which knows collectives but no messages between two ranks. Each counts
its own calls, also on a group that has both backends, so that the two are told as two groups. A recorder keeps the last 2,000
calls unless TORCH_FR_BUFFER_SIZE says otherwise.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import FabricError
from cluster.fabric.watch.habits import HabitualCall
from cluster.fabric.watch.state import NO_PEER, Call, GroupCalls

KEPT_CALLS = 32
"""Latest calls of a group that are told to the head."""
_WORLD_DESCRIPTION = "default_pg"
_NO_DESCRIPTION = "undefined"
_BY_NAME_ALONE = frozenset({"gather", "scatter", "barrier"})
"""Ranks of one call may rightly give tensors of other sizes and types, or none."""
_BY_TYPE = frozenset({"all_to_all", "alltoall_base", "all_to_allv"})
"""Sizes may rightly differ between ranks."""
_NCCL = "nccl"
_RECORDERS: Mapping[str, str] = {_NCCL: "_dump_nccl_trace", "other": "_dump_fr_trace"}
"""torch's functions; with `_json` appended they give the counts of calls alone, and fast. In a build with NCCL both exist,
and the second knows nothing of NCCL."""
_PEER = re.compile(r"(?:send|recv) (\d+)(?:->|<-)(\d+)")


def counters() -> tuple[tuple[str, int, int], ...] | None:
    """(group, last call, last done) for each group of this process: changes whenever a collective begins or ends.

    None where nothing can be said yet: there is a group on NCCL, and its recorder holds no call. Takes less than a
    millisecond, however much the recorders hold. Raises FabricError where this torch has groups on NCCL and cannot tell of
    them.
    """
    from torch._C import _distributed_c10d as c10d

    found: list[tuple[str, int, int]] = []
    uses_nccl = _uses_nccl()
    _require_nccl_recorder(c10d, uses_nccl)
    for backend, function in _RECORDERS.items():
        dump = getattr(c10d, f"{function}_json", None)
        groups = json.loads(dump(includeCollectives=False)).get("pg_status", {}) if dump else {}
        if backend == _NCCL and uses_nccl and not groups:
            return None
        found += [
            (f"{backend} {name}", int(each["last_enqueued_collective"]), int(each["last_completed_collective"]))
            for name, each in sorted(groups.items())
        ]
    return tuple(found)


def recorded_calls() -> list[dict[str, Any]]:
    """All calls that the recorders hold, the oldest first. Costs tens of milliseconds where they are full.

    Raises FabricError where this torch has groups on NCCL and cannot tell of them.
    """
    from torch._C import _distributed_c10d as c10d

    _require_nccl_recorder(c10d, _uses_nccl())
    dumps = [getattr(c10d, function, None) for function in _RECORDERS.values()]
    entries = [
        entry for dump in dumps if dump for entry in pickle.loads(dump(includeStackTraces=False)).get("entries", [])
    ]
    return sorted(entries, key=lambda entry: int(entry["time_created_ns"]))


def _uses_nccl() -> bool:
    """Whether a group of this process runs on NCCL, alone or beside another backend."""
    import torch.distributed as dist

    return any(_NCCL in config for config in list(dist.distributed_c10d._world.pg_backend_config.values()))


def _require_nccl_recorder(c10d: Any, uses_nccl: bool) -> None:
    if uses_nccl and not hasattr(c10d, f"{_RECORDERS[_NCCL]}_json"):
        raise FabricError(
            "this torch has groups on NCCL and no flight recorder for them (torch._C._distributed_c10d._dump_nccl_trace_json):"
            " the watch needs torch 2.5 or later"
        )


def group_members() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name of each group of this process -> (description, world ranks in the group's order)."""
    import torch.distributed as dist

    world = dist.distributed_c10d._world
    return {
        name: (group.group_desc, tuple(dist.get_process_group_ranks(group)))
        for group, name in list(world.pg_names.items())
        if isinstance(group, dist.ProcessGroup)
    }


def axis_name(name: str, description: str) -> str:
    """A group for people: the axis of the mesh, "world", or its own name where nobody has described it."""
    if description == _WORLD_DESCRIPTION:
        return "world"
    if description in ("", _NO_DESCRIPTION):
        return f"group {name[:8]}"
    return description.removeprefix("mesh_")  # as init_device_mesh calls them


def group_calls(
    entries: Sequence[Mapping[str, Any]], members: Mapping[str, tuple[str, tuple[int, ...]]], now_ns: int
) -> tuple[GroupCalls, ...]:
    """The last calls on each group in `members`; `now_ns` is in nanoseconds since 1970, as the recorder stamps calls."""
    latest = _latest_groups(entries)
    by_group: dict[str, dict[str, list[Call]]] = {name: {} for name in members}
    for entry in entries:
        name = entry["process_group"][0]
        if name in members and entry["pg_id"] == latest[_counted_name(entry)]:
            calls = by_group[name].setdefault(_counted_name(entry), [])
            calls.append(_call(entry, members[name][1], now_ns))
    return tuple(
        GroupCalls(name=counted, axis=axis_name(name, description), ranks=ranks, calls=tuple(calls[-KEPT_CALLS:]))
        for name, (description, ranks) in members.items()
        if len(ranks) > 1
        for counted, calls in sorted((by_group[name] or {name: []}).items())
    )


def habitual_calls(entries: Sequence[Mapping[str, Any]]) -> list[HabitualCall]:
    """The collectives of all groups in the order of calls."""
    latest = _latest_groups(entries)
    return [
        HabitualCall(
            group=_counted_name(entry),
            axis=axis_name(*entry["process_group"]),
            number=entry["collective_seq_id"],
            text=_text(entry),
            digest=_digest(entry),
        )
        for entry in entries
        if not entry["is_p2p"] and entry["pg_id"] == latest[_counted_name(entry)]
    ]


def _counted_name(entry: Mapping[str, Any]) -> str:
    """A group as one backend counts its calls; the same on all ranks, whatever each has called so far."""
    name = str(entry["process_group"][0])
    return f"{name} on {_NCCL}" if entry["profiling_name"].startswith(f"{_NCCL}:") else name


def _latest_groups(entries: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """A process that opens a second world names its groups from the start again: the later one counts."""
    latest: dict[str, int] = {}
    for entry in entries:
        name = _counted_name(entry)
        latest[name] = max(latest.get(name, 0), entry["pg_id"])
    return latest


def _call(entry: Mapping[str, Any], ranks: Sequence[int], now_ns: int) -> Call:
    peer = None
    if entry["is_p2p"]:  # "send ME->PEER", "recv ME<-PEER", by their places in the group
        ends = _PEER.search(entry["profiling_name"])
        peer = ranks[int(ends[2])] if ends else NO_PEER
    return Call(
        number=entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"],
        text=_text(entry),
        digest=_digest(entry),
        done=bool(entry["retired"]) or entry["state"] == "completed",
        age_s=max(0.0, (now_ns - entry["time_created_ns"]) / 1e9),
        peer=peer,
    )


def _kind(entry: Mapping[str, Any]) -> str:
    kind = entry["profiling_name"].rsplit(":", 1)[-1].lstrip("_")
    return {"allgather_base": "all_gather", "reduce_scatter_base": "reduce_scatter"}.get(kind, kind)


def _text(entry: Mapping[str, Any]) -> str:
    sizes, dtypes = entry["input_sizes"], entry["input_dtypes"]
    if not sizes:
        return _kind(entry)
    return f"{_kind(entry)} of {sum(math.prod(size) for size in sizes)} {'+'.join(sorted(set(dtypes)))}"


def _digest(entry: Mapping[str, Any]) -> str:
    kind = _kind(entry)
    if kind in _BY_NAME_ALONE:
        return kind
    if kind in _BY_TYPE:
        return f"{kind} {'+'.join(sorted(set(entry['input_dtypes'])))}"
    return _text(entry)
