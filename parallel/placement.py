"""Where a rank's part of a parameter lies in the whole.

Tensor, expert and pipeline parallelism keep plain local tensors: the model computes with them as if they were all there
is. What they are a part of is written down here, beside them, for those who need the whole: checkpoints, initial weights,
the gradient's norm, Muon. FSDP2 then shards the local tensor further, and says so itself (a DTensor).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from parallel.mesh import Axis


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One dim of a tensor in `parts` equal parts, of which this rank holds number `index`.

    `axis` is where the parts lie side by side; where it has more ranks than parts, neighbours hold the same part.
    """

    dim: int
    parts: int
    index: int
    axis: Axis


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A parameter's whole shape, and how it is cut.

    `sum_axes`: the axes over which its gradient must still be summed after the backward, beside the data axes.
    `is_expert`: it is laid out on the experts' grid, whose data axes are dp_replicate and edp_shard. `num_stages`: how many
    pipeline stages hold it (a tied embedding: the first and the last).
    """

    shape: torch.Size
    cuts: tuple[Cut, ...] = ()
    sum_axes: tuple[Axis, ...] = ()
    is_expert: bool = False
    num_stages: int = 1

    @property
    def data_axes(self) -> tuple[str, ...]:
        """The axes along which ranks hold the same part and see other samples or tokens."""
        return ("dp_replicate", "edp_shard") if self.is_expert else ("dp_replicate", "dp_shard", "cp")

    @property
    def local_shape(self) -> torch.Size:
        """Shape of this rank's part, before FSDP2."""
        sizes = list(self.shape)
        for cut in self.cuts:
            sizes[cut.dim] //= cut.parts
        return torch.Size(sizes)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where this rank's part begins in the whole."""
        begin = [0] * len(self.shape)
        for cut in self.cuts:
            begin[cut.dim] += cut.index * (self.shape[cut.dim] // cut.parts)
        return tuple(begin)

    @property
    def num_parts(self) -> int:
        """Different parts that there are."""
        return math.prod(cut.parts for cut in self.cuts)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A box of a whole tensor: `local` (plain, maybe empty) lies at `offsets` in a tensor of `shape`."""

    local: Tensor
    shape: torch.Size
    offsets: tuple[int, ...]


def piece_of(tensor: Tensor, placement: Placement | None = None) -> Piece:
    """The part of a parameter (or of an optimizer's state of the same shape) that this rank holds. Shares memory.

    `tensor` is plain, or a DTensor as FSDP2 makes of the local part. Without a placement the tensor itself is the whole.
    """
    placement = placement or Placement(shape=tensor.shape)
    offsets = placement.offsets
    local = tensor.detach()
    if isinstance(local, DTensor):
        _, inner = compute_local_shape_and_global_offset(local.shape, local.device_mesh, local.placements)
        offsets = tuple(outer + more for outer, more in zip(offsets, inner, strict=True))
        local = local.to_local()
    return Piece(local=local, shape=placement.shape, offsets=offsets)
