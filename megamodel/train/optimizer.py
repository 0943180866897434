"""Which parameter is updated by which rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from megamodel.train.config import OptimizerConfig
from megamodel.train.muon import Muon
from parallel.gradients import PlacedParameter
from parallel.mesh import Mesh

# Lookup tables, scales and the router's small matrix: no direction in them is worth decaying or making orthogonal.
_UNDECAYED = ("embedding.weight", "lm_head.weight", "norm.weight", "router.weight")


class Optimizers:
    """All optimizers of a run as one: they step, and follow the schedule, together."""

    def __init__(self, members: list[Optimizer]) -> None:
        self.members = members
        self._peaks = [[group["lr"] for group in member.param_groups] for member in members]

    def step(self, factor: float) -> None:
        """Updates every parameter at `factor` times its peak learning rate, and drops all gradients."""
        for member, peaks in zip(self.members, self._peaks, strict=True):
            for group, peak in zip(member.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            member.step()
        self.discard()

    def discard(self) -> None:
        """Drops all gradients and updates nothing."""
        for member in self.members:
            member.zero_grad(set_to_none=True)


def build_optimizers(
    parameters: Sequence[PlacedParameter], config: OptimizerConfig, compute_dtype: torch.dtype, mesh: Mesh
) -> Optimizers:
    """AdamW, and Muon for the blocks' matrices where `config` says so."""
    matrices: list[tuple[str, Tensor]] = []
    others: list[tuple[str, Tensor]] = []
    for placed in parameters:
        (others if placed.name.endswith(_UNDECAYED) else matrices).append((placed.name, placed.parameter))
    adamw_groups = _groups(others, weight_decay=0.0)
    members: list[Optimizer] = []
    if config.name == "muon":
        members.append(
            Muon(
                matrices,
                lr=config.muon_lr,
                momentum=config.muon_momentum,
                weight_decay=config.weight_decay,
                dtype=compute_dtype,
                axis=mesh.axis("dp_replicate", "dp_shard", "cp", "tp"),  # whoever holds the same blocks
                placements={placed.parameter: placed.placement for placed in parameters},
            )
        )
    else:
        adamw_groups += _groups(matrices, weight_decay=config.weight_decay)
    members.append(
        AdamW(
            adamw_groups,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
    )
    return Optimizers(members)


def _groups(parameters: list[tuple[str, Tensor]], *, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters on each mesh, and plain ones, apart: a fused optimizer takes no mixture of them in one group."""
    groups: dict[Any, list[tuple[str, Tensor]]] = {}
    for name, parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(mesh, []).append((name, parameter))
    return [{"params": members, "weight_decay": weight_decay} for members in groups.values()]
