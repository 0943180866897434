"""Muon (Jordan et al. 2024) for matrices and stacks of matrices.

torch.optim.Muon takes 2-D parameters only; experts are stacked in 3-D ones, and a sharded matrix must be whole before it
can be made orthogonal. Both are done here; on 2-D unsharded parameters the result is that of torch.optim.Muon with
`adjust_lr_fn="match_rms_adamw"`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

# Coefficients of the quintic iteration, and its steps, as Jordan et al. chose them.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Replaces the singular values of each (m, n) matrix in (..., m, n) by values near one; float32 result."""
    a, b, c = _QUINTIC
    wide = x.shape[-2] <= x.shape[-1]
    y = (x if wide else x.mT).to(dtype)
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(_ITERATIONS):
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return (y if wide else y.mT).float()


class Muon(Optimizer):
    """Momentum made orthogonal. An update has root mean square 0.2 * lr (Liu et al. 2025, eq. 4), as AdamW's has about.

    Parameters are (..., m, n); sharded ones (DTensor) are gathered for the orthogonalisation, except stacks sharded along
    the stack, which need nothing from other ranks. With those gathers `step` is a collective over the parameter's mesh.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float, momentum: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, parameter: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        grad, buffer = parameter.grad, state["momentum_buffer"]
        assert grad is not None
        buffer.lerp_(grad, 1.0 - momentum)
        direction = self._orthogonal(grad.lerp(buffer, momentum))
        parameter.mul_(1.0 - lr * weight_decay)
        parameter.add_(direction, alpha=-0.2 * lr * max(parameter.shape[-2:]) ** 0.5)

    def _orthogonal(self, update: Tensor) -> Tensor:
        if not isinstance(update, DTensor):
            return orthogonalize(update, self._dtype)
        mesh, placements = update.device_mesh, update.placements
        if all(isinstance(p, Shard) and p.dim < update.dim() - 2 for p in placements):
            local = update.to_local()
            whole = orthogonalize(local, self._dtype) if local.numel() else local
            return DTensor.from_local(whole, mesh, placements, shape=update.shape, stride=update.stride())
        # Every rank computes the same whole matrix, so its shards need no sending (src_data_rank=None).
        return distribute_tensor(orthogonalize(update.full_tensor(), self._dtype), mesh, placements, src_data_rank=None)
