"""Named sets of groups of ranks: the world, the axes of a mesh, rails. What a sweep measures."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import FabricError
from cluster.fabric.probing import Endpoint

MESH_ORDER = ("pp", "dp_replicate", "dp", "dp_shard", "edp_shard", "cp", "ep", "tp", "expert_tp")
"""Axes of a mesh, the slowest first: ranks that differ in the last one alone are neighbours. `dp`: data parallelism whose
kind does not matter. `edp_shard`, `ep` and `expert_tp` are the experts' own grid of the same ranks."""


@dataclass(frozen=True, kw_only=True)
class GroupSet:
    """Groups of one size that a run uses side by side, such as all its `tp` groups."""

    name: str
    groups: tuple[tuple[int, ...], ...]
    """World ranks; no rank is in two groups."""
    only_together: bool = False
    """Not to be measured one group at a time: each group is in a set of its own as well."""

    @property
    def group_size(self) -> int:
        """Ranks of each group."""
        return len(self.groups[0])


def world_group(world_size: int) -> GroupSet:
    """All ranks as one group, called `world`."""
    return GroupSet(name="world", groups=(tuple(range(world_size)),))


def mesh_groups(mesh: str, world_size: int) -> tuple[GroupSet, ...]:
    """The groups along each axis of a mesh such as `dp_shard=2,cp=2,tp=4`, in the order of MESH_ORDER, however it is written.

    An entry without a size asks for axes that are flattened into one, by their names joined: `dp_shard=2,cp=2,dp_shard_cp`.
    Axes of one rank have no groups and are left out.

    Raises FabricError: an unknown axis, a size that is no number above zero, or sizes that do not make up the world.
    """
    entries = [entry.strip() for entry in mesh.split(",") if entry.strip()]
    sizes = dict(_axis_of(entry, mesh) for entry in entries if "=" in entry)
    total = math.prod(sizes.values())
    if total != world_size:
        raise FabricError(f"--mesh {mesh}: these axes make {total} ranks, and there are {world_size}")
    order = [name for name in MESH_ORDER if name in sizes]
    wanted: list[tuple[str, tuple[str, ...]]] = [(name, (name,)) for name in order]
    for entry in entries:
        if "=" not in entry:
            parts = flattened_axes(entry)
            if parts is None or not set(parts) <= sizes.keys():
                raise FabricError(
                    f"--mesh {mesh}: {entry!r} is no axis with a size, nor axes of this mesh joined by '_'"
                )
            wanted.append((entry, parts))
    sets = [GroupSet(name=name, groups=_along(parts, order, sizes)) for name, parts in wanted]
    return tuple(each for each in sets if each.group_size > 1)


def flattened_axes(name: str) -> tuple[str, ...] | None:
    """The axes whose names, joined by `_`, make up `name`, in that order; None where none do."""
    if not name:
        return ()
    for axis in MESH_ORDER:
        if name == axis:
            return (axis,)
        if name.startswith(f"{axis}_"):
            rest = flattened_axes(name.removeprefix(f"{axis}_"))
            if rest is not None:
                return (axis, *rest)
    return None


def rail_groups(endpoints: Sequence[Endpoint]) -> tuple[GroupSet, ...]:
    """`rail 0`, `rail 1`, ...: the ranks with the same place in each host, as one group each; then `rails`, for all at once.

    None where there is one rail or one host only: its ranks are the world.
    """
    by_rail: dict[int, list[int]] = defaultdict(list)
    for endpoint in endpoints:
        by_rail[endpoint.rail].append(endpoint.rank)
    rails = {rail: tuple(ranks) for rail, ranks in sorted(by_rail.items()) if len(ranks) > 1}
    if len(rails) < 2:
        return ()
    sets = tuple(GroupSet(name=f"rail {rail}", groups=(ranks,)) for rail, ranks in rails.items())
    if len({each.group_size for each in sets}) > 1:
        return sets  # some hosts lack a rail: groups of one set have one size
    return (*sets, GroupSet(name="rails", groups=tuple(rails.values()), only_together=True))


def _axis_of(entry: str, mesh: str) -> tuple[str, int]:
    name, _, size = (part.strip() for part in entry.partition("="))
    if name not in MESH_ORDER:
        raise FabricError(f"--mesh {mesh}: {name!r} is no axis of a mesh: known are {', '.join(MESH_ORDER)}")
    if not size.isdecimal() or int(size) < 1:
        raise FabricError(f"--mesh {mesh}: the size of {name} is {size!r}: give a whole number above zero")
    return name, int(size)


def _along(parts: Sequence[str], order: Sequence[str], sizes: dict[str, int]) -> tuple[tuple[int, ...], ...]:
    """The groups of ranks that share all coordinates but those of `parts`, ranks in rising order."""
    strides: dict[str, int] = {}
    stride = 1
    for name in reversed(order):
        strides[name] = stride
        stride *= sizes[name]
    by_rest: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank in range(stride):
        rest = tuple(rank // strides[name] % sizes[name] for name in order if name not in parts)
        by_rest[rest].append(rank)
    return tuple(tuple(ranks) for ranks in by_rest.values())
