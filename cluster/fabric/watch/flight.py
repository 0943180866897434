"""What this process's flight recorder of torch tells: which collectives it called, on which group, and which are done.

The one place that knows torch's records. The recorder runs for NCCL and, from torch 2.13 on, for gloo, where it knows
collectives but no messages between two ranks. It keeps the last 2,000 calls unless TORCH_FR_BUFFER_SIZE says otherwise.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

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
_PEER = re.compile(r"(?:send|recv) (\d+)(?:->|<-)(\d+)")


def counters() -> tuple[tuple[str, int, int], ...]:
    """(group, last call, last done) for each group of this process: changes whenever a collective begins or ends.

    Takes less than a millisecond, however much the recorder holds.
    """
    from torch._C import _distributed_c10d as c10d

    if not hasattr(c10d, "_dump_fr_trace_json"):
        return ()
    groups = json.loads(c10d._dump_fr_trace_json(includeCollectives=False))["pg_status"]
    return tuple(
        (name, int(each["last_enqueued_collective"]), int(each["last_completed_collective"]))
        for name, each in sorted(groups.items())
    )


def recorded_calls() -> list[dict[str, Any]]:
    """All calls that the recorder holds, the oldest first. Costs tens of milliseconds where it is full."""
    from torch._C import _distributed_c10d as c10d

    dump = getattr(c10d, "_dump_fr_trace", None) or getattr(c10d, "_dump_nccl_trace", None)
    return pickle.loads(dump(includeStackTraces=False)).get("entries", []) if dump else []


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
    by_group: dict[str, list[Call]] = defaultdict(list)
    for entry in entries:
        name = entry["process_group"][0]
        if name in members and entry["pg_id"] == latest[name]:
            by_group[name].append(_call(entry, members[name][1], now_ns))
    return tuple(
        GroupCalls(name=name, axis=axis_name(name, description), ranks=ranks, calls=tuple(by_group[name][-KEPT_CALLS:]))
        for name, (description, ranks) in members.items()
        if len(ranks) > 1
    )


def habitual_calls(entries: Sequence[Mapping[str, Any]]) -> list[HabitualCall]:
    """The collectives of all groups in the order of calls."""
    latest = _latest_groups(entries)
    return [
        HabitualCall(
            group=entry["process_group"][0],
            axis=axis_name(*entry["process_group"]),
            number=entry["collective_seq_id"],
            text=_text(entry),
            digest=_digest(entry),
        )
        for entry in entries
        if not entry["is_p2p"] and entry["pg_id"] == latest[entry["process_group"][0]]
    ]


def _latest_groups(entries: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """A process that opens a second world names its groups from the start again: the later one counts."""
    latest: dict[str, int] = {}
    for entry in entries:
        name = entry["process_group"][0]
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
