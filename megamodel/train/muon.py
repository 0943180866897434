"""Muon (Jordan et al. 2024) for matrices and stacks of matrices.

torch.optim.Muon takes 2-D parameters only; experts are stacked in 3-D ones, and a sharded matrix must be whole before it
can be made orthogonal. Both are done here; on 2-D unsharded parameters the result is that of torch.optim.Muon with
`adjust_lr_fn="match_rms_adamw"`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from parallel.collectives import all_gather
from parallel.gradients import in_buckets
from parallel.mesh import Axis
from parallel.placement import Cut, Placement

# Coefficients of the quintic iteration, and its steps, as Jordan et al. chose them.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_BUCKET_ELEMENTS = 2**28


def orthogonalize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Replaces the singular values of each (m, n) matrix in (..., m, n) by values near one; result in `dtype`."""
    a, b, c = _QUINTIC
    wide = x.shape[-2] <= x.shape[-1]
    y = (x if wide else x.mT).to(dtype)
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(_ITERATIONS):
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return y if wide else y.mT


class Muon(Optimizer):
    """Momentum made orthogonal. An update has root mean square 0.2 * lr (Liu et al. 2025, eq. 4), as AdamW's has about.

    Parameters are (..., m, n). Those that every rank of `axis` holds whole are dealt out: each rank orthogonalises its share,
    and one all-gather brings the results, in `dtype`, to all. Those of which a rank holds a part of each matrix (sharded by
    FSDP2, or cut as `placements` says) are gathered first; parts of a stack of whole matrices need nothing from other ranks.
    So `step` is a collective over `axis`, and over the axes along which parameters are spread.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype,
        axis: Axis,
        placements: Mapping[Tensor, Placement] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._dtype = dtype
        self._axis = axis
        self._placements = placements or {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            with_grad = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameters in in_buckets(with_grad, _BUCKET_ELEMENTS):
                updates = [self._with_momentum(parameter, group["momentum"]) for parameter in parameters]
                for parameter, direction in zip(parameters, self._directions(parameters, updates), strict=True):
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction, alpha=-0.2 * group["lr"] * max(self._whole_shape(parameter)[-2:]) ** 0.5)

    def _whole_shape(self, parameter: Tensor) -> torch.Size:
        placement = self._placements.get(parameter)
        return parameter.shape if placement is None else placement.shape

    def _with_momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        state["momentum_buffer"].lerp_(parameter.grad, 1.0 - momentum)
        return parameter.grad.lerp(state["momentum_buffer"], momentum)

    def _directions(self, parameters: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
        cuts = [placement.cuts if (placement := self._placements.get(p)) else () for p in parameters]
        whole = [i for i, update in enumerate(updates) if not isinstance(update, DTensor) and not cuts[i]]
        shared = dict(zip(whole, self._share([updates[index] for index in whole]), strict=True))
        return [
            shared[index] if index in shared else self._orthogonal_part(update, cuts[index])
            for index, update in enumerate(updates)
        ]

    def _share(self, updates: list[Tensor]) -> list[Tensor]:
        """Orthogonal versions of what every rank holds alike, each computed by one rank."""
        if len(updates) < self._axis.size or not self._axis.is_split:
            # Fewer pieces than ranks: every rank would wait for, and make room for, the largest piece all the same.
            return [orthogonalize(update, self._dtype).to(update.dtype) for update in updates]
        owners = assign_owners([_cost(update) for update in updates], self._axis.size)
        sizes = [0] * self._axis.size
        for owner, update in zip(owners, updates, strict=True):
            sizes[owner] += update.numel()
        mine = torch.zeros(max(sizes), dtype=self._dtype, device=updates[0].device)
        filled = 0
        for owner, update in zip(owners, updates, strict=True):
            if owner == self._axis.rank:
                mine[filled : filled + update.numel()] = orthogonalize(update, self._dtype).flatten()
                filled += update.numel()
        gathered = all_gather(mine, self._axis, 0).view(self._axis.size, -1)
        taken = [0] * self._axis.size
        directions = []
        for owner, update in zip(owners, updates, strict=True):
            part = gathered[owner, taken[owner] : taken[owner] + update.numel()]
            taken[owner] += update.numel()
            directions.append(part.view(update.shape).to(update.dtype))
        return directions

    def _orthogonal_part(self, update: Tensor, cuts: tuple[Cut, ...]) -> Tensor:
        """This rank's part of the orthogonal version of something of which it holds a part."""
        stack_dims = update.dim() - 2
        cuts = tuple(cut for cut in cuts if cut.dim >= stack_dims)
        shards = update.placements if isinstance(update, DTensor) else ()
        if not cuts and all(isinstance(p, Replicate) or (isinstance(p, Shard) and p.dim < stack_dims) for p in shards):
            local = update.to_local() if isinstance(update, DTensor) else update
            whole = orthogonalize(local, self._dtype).to(local.dtype) if local.numel() else local
            return _sharded_like(whole, update, from_local=True)
        whole = update.full_tensor() if isinstance(update, DTensor) else update
        for cut in cuts:
            whole = _gather(whole, cut)
        direction = orthogonalize(whole, self._dtype).to(update.dtype)
        for cut in cuts:
            direction = direction.chunk(cut.parts, dim=cut.dim)[cut.index]
        return _sharded_like(direction.contiguous(), update, from_local=False)


def _gather(part: Tensor, cut: Cut) -> Tensor:
    """The whole along a cut dim. Neighbours on the axis may hold copies of the same part."""
    parts = all_gather(part, cut.axis, cut.dim).chunk(cut.axis.size, dim=cut.dim)
    return torch.cat(parts[:: cut.axis.size // cut.parts], dim=cut.dim)


def _sharded_like(values: Tensor, like: Tensor, *, from_local: bool) -> Tensor:
    """`values` (this rank's shard, or the whole, which every rank has alike) spread over ranks as `like` is."""
    if not isinstance(like, DTensor):
        return values
    if from_local:
        return DTensor.from_local(values, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    # Nothing needs sending (src_data_rank=None).
    return distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)


def assign_owners(costs: list[float], num_ranks: int) -> list[int]:
    """The rank that does each piece of work: the dearest pieces first, each to the least burdened rank."""
    burden = [0.0] * num_ranks
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        owners[index] = min(range(num_ranks), key=lambda rank: (burden[rank], rank))
        burden[owners[index]] += costs[index]
    return owners


def _cost(update: Tensor) -> float:
    """Multiplications of the orthogonalisation, up to a factor: m * m * n for the shorter side m."""
    return float(update.numel() * min(update.shape[-2:]))
