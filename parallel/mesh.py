"""All process groups of a run, made in one place: the ranks of a world as a grid with named axes.

The grid is (pp, dp_replicate, dp_shard, cp, tp), tp the fastest: neighbours in rank talk most. Experts fold the same ranks
otherwise: dp_shard * cp * tp = edp_shard * ep * expert_tp, expert_tp the fastest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

if TYPE_CHECKING:
    from parallel.layout import Layout
    from parallel.world import World

DENSE_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERT_AXES = ("pp", "dp_replicate", "edp_shard", "ep", "expert_tp")

# Every set of axes whose ranks talk together.
_GROUPS = (
    ("pp",),
    ("dp_replicate",),
    ("cp",),
    ("tp",),
    ("cp", "tp"),
    ("dp_shard", "cp"),
    ("dp_replicate", "dp_shard", "cp"),
    ("dp_replicate", "dp_shard", "cp", "tp"),
    ("ep",),
    ("expert_tp",),
    ("ep", "expert_tp"),
    ("edp_shard",),
    ("dp_replicate", "edp_shard"),
)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The ranks that differ from this one along one axis of the mesh (or several, flattened), this one among them.

    `ranks` are world ranks, in the order of the axis; `rank` is this one's place among them. `group` is None where the
    axis has one rank only: then no collective is needed, and none is made.
    """

    name: str
    size: int
    rank: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None

    @property
    def is_split(self) -> bool:
        """Whether there is anybody else on this axis."""
        return self.size > 1


def single_axis(name: str, rank: int = 0) -> Axis:
    """An axis of one rank."""
    return Axis(name=name, size=1, rank=0, ranks=(rank,), group=None)


class Mesh:
    """The grid of one run, seen from one rank. Making it, and `device_mesh`, `sub_axis` and `pipeline_ends`, is a collective
    over the world: groups are made by all ranks, in one order.

    torch names a group by its ranks and the number of groups that a process has. So ranks of another count wait for one
    another in vain, and even a rank that has no use for a group of its own must make one.
    """

    def __init__(self, world: World, layout: Layout, *, host_tensors: bool = False) -> None:
        """`host_tensors`: some of what the groups carry lies in CPU memory though the world computes on GPUs."""
        self.world = world
        self.layout = layout
        self._host_tensors = host_tensors
        sizes = layout.axis_sizes
        grid = torch.arange(world.world_size)
        self._dense = grid.view([sizes[name] for name in DENSE_AXES])
        self._expert = grid.view([sizes[name] for name in EXPERT_AXES])
        self._axes: dict[tuple[str, ...], Axis] = {}
        self._device_meshes: dict[tuple[tuple[str, ...], ...], DeviceMesh] = {}
        for names in _GROUPS:
            self._axes[names] = self._make("_".join(names), self._neighbours(names))

    def axis(self, *names: str) -> Axis:
        """The ranks that share all coordinates with this one but those of `names` (in the mesh's order)."""
        return self._axes[names]

    def sub_axis(self, name: str, size: int) -> Axis:
        """The `size` consecutive ranks of an axis among which this rank is; `size` divides the axis."""
        key = (name, str(size))
        if key not in self._axes:
            whole = self.axis(name)
            start = whole.rank // size * size
            self._axes[key] = self._make(f"{name}_{size}", whole.ranks[start : start + size])
        return self._axes[key]

    def pipeline_ends(self) -> Axis:
        """The first and the last rank of the pipeline, on these two; on any other, itself alone."""
        pp = self.axis("pp")
        if pp.rank in (0, pp.size - 1):
            return self._make("pp_tied", (pp.ranks[0], pp.ranks[-1]))
        self._group("pp_tied_alone", (self.world.rank,))
        return single_axis("pp_tied", self.world.rank)

    def device_mesh(self, *dims: tuple[str, ...]) -> DeviceMesh:
        """torch's view of some axes, each dim the flattening of axes: what FSDP2 wants. Every dim needs a group."""
        if dims not in self._device_meshes:
            axes = [self.axis(*dim) for dim in dims]
            groups = [axis.group or self._group(f"{axis.name}_alone", axis.ranks) for axis in axes]
            ranks = self._neighbours(tuple(name for dim in dims for name in dim))
            shape = [axis.size for axis in axes]
            self._device_meshes[dims] = DeviceMesh.from_group(
                groups if len(groups) > 1 else groups[0],
                self.world.device.type,
                mesh=torch.tensor(ranks).view(shape),
                mesh_dim_names=tuple(axis.name for axis in axes),
            )
        return self._device_meshes[dims]

    def coordinate(self, name: str) -> int:
        """This rank's place along one axis."""
        names, grid = (DENSE_AXES, self._dense) if name in DENSE_AXES else (EXPERT_AXES, self._expert)
        return int((grid == self.world.rank).nonzero()[0, names.index(name)])

    @property
    def data_rank(self) -> int:
        """This rank's number among those that see different samples."""
        return self.coordinate("dp_replicate") * self.layout.dp_shard + self.coordinate("dp_shard")

    def size(self, *names: str) -> int:
        """Ranks along some axes together."""
        return math.prod(self.layout.axis_sizes[name] for name in names)

    def _neighbours(self, names: tuple[str, ...]) -> tuple[int, ...]:
        dense = all(name in DENSE_AXES for name in names)
        order, grid = (DENSE_AXES, self._dense) if dense else (EXPERT_AXES, self._expert)
        place = (grid == self.world.rank).nonzero()[0].tolist()
        index = tuple(slice(None) if name in names else at for name, at in zip(order, place, strict=True))
        return tuple(grid[index].flatten().tolist())

    def _make(self, name: str, ranks: tuple[int, ...]) -> Axis:
        group = self._group(name, ranks) if len(ranks) > 1 else None
        return Axis(name=name, size=len(ranks), rank=ranks.index(self.world.rank), ranks=ranks, group=group)

    def _group(self, name: str, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """A group that its members alone have to ask for, so that a mesh of thousands costs each rank a few groups."""
        return dist.new_group(
            list(ranks),
            timeout=self.world.timeout,
            # On GPUs without the CPU's backend beside NCCL, whose groups connect when first used: gloo's connect at once.
            backend="nccl" if self.world.backend == "nccl" and not self._host_tensors else None,
            use_local_synchronization=True,
            group_desc=name,
        )
