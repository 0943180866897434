"""What is left to do with gradients after the backward: sums over ranks that no engine has made, and the global norm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from parallel.mesh import Axis, Mesh
from parallel.placement import Placement

_BUCKET_ELEMENTS = 2**26


@dataclass(frozen=True, kw_only=True)
class PlacedParameter:
    """A parameter with its global name and placement."""

    name: str
    parameter: nn.Parameter
    placement: Placement


def placed_parameters(parts: Sequence[nn.Module], placements: Mapping[str, Placement]) -> list[PlacedParameter]:
    """Every parameter of a rank's parts of a model, each once; those without a placement are whole.

    In the order of registration, which is that of every rank with the same parts. A model on meta gets new parameters when
    it is materialised, so ask after that.
    """
    found: dict[str, PlacedParameter] = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            placement = placements.get(name) or Placement(shape=parameter.shape)
            found.setdefault(name, PlacedParameter(name=name, parameter=parameter, placement=placement))
    return list(found.values())


def twins(parts: Sequence[nn.Module]) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Parameters that two parts on one rank hold under one name (a tied embedding in the first and the last stage), the
    one that is updated first."""
    first: dict[str, nn.Parameter] = {}
    found = []
    for part in parts:
        for name, parameter in part.named_parameters():
            if first.setdefault(name, parameter) is not parameter:
                found.append((first[name], parameter))
    return found


@torch.no_grad()
def move_twins_gradients(parts: Sequence[nn.Module]) -> None:
    """Adds the gradient of each second copy to that of the first. No communication: both are spread alike."""
    for first, second in twins(parts):
        if second.grad is not None:
            first.grad = second.grad if first.grad is None else first.grad + second.grad
            second.grad = None


@torch.no_grad()
def copy_to_twins(parts: Sequence[nn.Module]) -> None:
    """Gives each second copy the value of the first."""
    for first, second in twins(parts):
        _local(second).copy_(_local(first))


class GradientSums:
    """Sums, in few large all-reduces, what is partial on each rank after the backward.

    A parameter that FSDP2 does not shard (a plain tensor) is summed over its data axes; every parameter over its
    placement's `sum_axes`. `engine_sums_data`: the engine has summed plain ones over the data axes already (DDP).
    """

    def __init__(self, mesh: Mesh, *, engine_sums_data: bool, reduce_dtype: torch.dtype) -> None:
        self._mesh = mesh
        self._engine_sums_data = engine_sums_data
        self._reduce_dtype = reduce_dtype

    @torch.no_grad()
    def finish(self, parameters: Sequence[PlacedParameter]) -> None:
        """Collectives over the axes concerned; every rank calls it once a step, after its last backward."""
        by_axis: dict[Axis, list[Tensor]] = {}
        for placed in parameters:
            axes = self._axes(placed)
            if not axes:
                continue
            parameter = placed.parameter
            if parameter.grad is None:  # not used on this rank, and perhaps on another
                parameter.grad = torch.zeros_like(parameter)
            for axis in axes:
                by_axis.setdefault(axis, []).append(_local(parameter.grad))
        for axis in sorted(by_axis, key=lambda axis: axis.name):
            for bucket in in_buckets(by_axis[axis], _BUCKET_ELEMENTS):
                self._sum(bucket, axis)

    def _axes(self, placed: PlacedParameter) -> list[Axis]:
        sum_axes = [axis for axis in placed.placement.sum_axes if axis.is_split]
        if self._engine_sums_data or isinstance(placed.parameter, DTensor):
            return sum_axes
        data = placed.placement.data_axes
        tp = self._mesh.axis("tp")
        if tp in sum_axes:  # one sum over both, where the axes are those of one grid
            return [axis for axis in (self._mesh.axis(*data, "tp"), *sum_axes) if axis.is_split and axis is not tp]
        return [axis for axis in (self._mesh.axis(*data), *sum_axes) if axis.is_split]

    def _sum(self, gradients: list[Tensor], axis: Axis) -> None:
        flat = torch.cat([gradient.flatten() for gradient in gradients]).to(self._reduce_dtype)
        dist.all_reduce(flat, group=axis.group)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def clip_global_norm(mesh: Mesh, parameters: Sequence[PlacedParameter], max_norm: float) -> Tensor:
    """Scales all gradients down so that their global 2-norm is at most `max_norm` (`inf`: only measures it).

    Each rank adds up its squares, divided by the number of ranks that hold the same element; one all-reduce of one number
    over the world then fits any mixture of meshes. Where every rank holds everything no rank needs to ask. Returns the
    norm before, float64 and 0-dim, equal on every rank; not finite if any gradient is not. A collective over the world.
    """
    device = mesh.world.device
    by_copies: dict[tuple[int, torch.device], list[Tensor]] = {}
    for placed in parameters:
        if placed.parameter.grad is not None:
            local = _local(placed.parameter.grad)
            by_copies.setdefault((num_copies(placed, mesh), local.device), []).append(local)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for (copies, _), gradients in by_copies.items():
        norms = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32))
        total += norms.double().square().sum().to(device) / copies
    if mesh.layout.pp > 1 or any(copies != mesh.world.world_size for copies, _ in by_copies):
        total = mesh.world.all_reduce_sum(total)
    else:
        total *= mesh.world.world_size
    norm = total.sqrt()
    if max_norm != math.inf:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
        for (_, place), gradients in by_copies.items():
            torch._foreach_mul_(gradients, factor.to(place))
    return norm


def num_copies(placed: PlacedParameter, mesh: Mesh) -> int:
    """How many ranks of the world hold each element of this rank's part of a parameter."""
    parts = placed.placement.num_parts
    if isinstance(placed.parameter, DTensor):
        spread = placed.parameter
        for dim, how in enumerate(spread.placements):
            parts *= spread.device_mesh.size(dim) if isinstance(how, Shard) else 1
    return mesh.world.world_size // mesh.layout.pp // parts * placed.placement.num_stages


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def in_buckets(tensors: Sequence[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Cuts a list so that what is made of a bucket's tensors stays small beside a large model: `limit` elements at most,
    or one tensor."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if bucket and held + tensor.numel() > limit:
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.numel()
    if bucket:
        yield bucket
