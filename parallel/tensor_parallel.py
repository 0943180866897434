"""Tensor parallelism with sequence parallelism (Shoeybi et al. 2019; Korthikanti et al. 2022) and the cutting of experts.

Between blocks each rank of `tp` has its slice of the sequence. Before attention or a feed-forward the slices are gathered,
each rank computes with its part of the weights (its heads, its hidden units), and the partial results are summed and
scattered back to slices. So the norms' work and memory are shared out too, and two collectives a layer and direction are
all there is.

torch has DTensor styles for this. Here activations stay plain tensors and the collectives stand where they are made:
compiled regions see nothing of an unusual type (with DTensor the embedding's gradient was lost there), fewer key and value
heads than ranks are possible, and the number of collectives is written down rather than deduced.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.collectives import all_gather, all_reduce, reduce_scatter
from parallel.mesh import Axis, Mesh
from parallel.placement import Cut, Placement

CutStyle = Literal["gathers_sequence", "gathers_output", "columns", "rows", "vocabulary", "experts"]


@dataclass(frozen=True, kw_only=True)
class CutModule:
    """A module of the model, and how it takes part.

    `gathers_sequence`: its input is gathered along the sequence. `gathers_output`: its output is. `columns`: its weight
    (out, in) is cut along out, in `parts` at most (a key and value head each, say), where ranks beyond that hold copies.
    `rows`: cut along in; its output is summed and scattered along the sequence. `vocabulary`: a weight (V, D) cut along V;
    an embedding's output is summed and scattered. `experts`: every stack (E, ., .) is cut along E over `ep`, and along the
    dim called `hidden_dim` (by parameter) over `expert_tp`.
    """

    name: str
    module: nn.Module
    style: CutStyle
    parts: int | None = None
    hidden_dim: dict[str, int] | None = None


def cut_modules(model: nn.Module, modules: Iterable[CutModule], mesh: Mesh) -> dict[str, Placement]:
    """Cuts a model that is on meta (any other loses its weights) and puts the collectives in place; no communication yet.

    Returns a placement for every parameter by name. Modules not named stay whole on each rank, and their gradients partial
    over `tp`.
    """
    tp = mesh.axis("tp")
    placements = {
        name: Placement(shape=parameter.shape, sum_axes=(tp,) if tp.is_split else ())
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    for cut in modules:
        if cut.style == "experts":
            placements |= _cut_experts(cut, mesh)
        elif tp.is_split:
            placements |= _cut_dense(cut, mesh, tp)
    return placements


def _cut_dense(cut: CutModule, mesh: Mesh, tp: Axis) -> dict[str, Placement]:
    module = cut.module
    if cut.style == "gathers_sequence":
        module.register_forward_pre_hook(lambda _, args: (all_gather(args[0], tp, 1), *args[1:]))
        return {}
    if cut.style == "gathers_output":
        module.register_forward_hook(lambda _, args, y: all_gather(y, tp, 1))
        return {}
    parts = min(tp.size, cut.parts or tp.size)
    copies = tp.size // parts
    if cut.style == "rows":
        module.register_forward_hook(lambda _, args, y: reduce_scatter(y, tp, 1))
    elif isinstance(module, nn.Embedding):
        _look_up_own_rows(module, tp)
    own = Cut(dim=1 if cut.style == "rows" else 0, parts=parts, index=tp.rank // copies, axis=tp)
    sum_axes = (mesh.sub_axis("tp", copies),) if copies > 1 else ()
    return {f"{cut.name}.weight": _cut_parameter(module, "weight", (own,), sum_axes=sum_axes)}


def _cut_experts(cut: CutModule, mesh: Mesh) -> dict[str, Placement]:
    ep, expert_tp = mesh.axis("ep"), mesh.axis("expert_tp")
    placements = {}
    for name, _ in list(cut.module.named_parameters()):
        hidden = (cut.hidden_dim or {})[name]
        cuts = [
            Cut(dim=dim, parts=axis.size, index=axis.rank, axis=axis)
            for dim, axis in ((0, ep), (hidden, expert_tp))
            if axis.is_split
        ]
        placement = _cut_parameter(cut.module, name, tuple(cuts), sum_axes=())
        placements[f"{cut.name}.{name}"] = replace(placement, is_expert=True)
    return placements


def _cut_parameter(module: nn.Module, name: str, cuts: tuple[Cut, ...], *, sum_axes: tuple[Axis, ...]) -> Placement:
    """Puts this rank's part, without values, in the place of a module's whole parameter."""
    whole: nn.Parameter = getattr(module, name)
    placement = Placement(shape=whole.shape, cuts=cuts, sum_axes=sum_axes)
    if placement.local_shape != whole.shape:
        setattr(module, name, nn.Parameter(torch.empty(placement.local_shape, dtype=whole.dtype, device="meta")))
    return placement


def _look_up_own_rows(module: nn.Embedding, tp: Axis) -> None:
    """Each rank looks up the ids whose rows it holds, and zeros stand for all others: the sum has every row once."""

    def forward(ids_BS: Tensor) -> Tensor:
        rows = module.weight.shape[0]
        local_BS = ids_BS - tp.rank * rows
        elsewhere_BS = (local_BS < 0) | (local_BS >= rows)
        x_BSD = F.embedding(local_BS.masked_fill(elsewhere_BS, 0), module.weight)
        return reduce_scatter(x_BSD.masked_fill(elsewhere_BS[..., None], 0.0), tp, 1)

    module.forward = forward  # type: ignore[assignment]


class VocabularyTerms(NamedTuple):
    """One chunk's summed loss, and its gradient with respect to this rank's columns of the logits."""

    loss_sum: Tensor
    grad_CV: Tensor


class VocabularyLoss:
    """Cross-entropy of logits whose vocabulary is cut over `tp`: three numbers a token travel, the logits never.

    A callable for chunks of the token loss: (C, V / tp) logits and (C,) labels in, each rank's gradient out. Every rank of
    the axis calls it with the same labels, in the forward only: two all-reduces, of C and of 2 * C float32 numbers.
    """

    def __init__(self, tp: Axis) -> None:
        self._tp = tp

    def __call__(self, logits_CV: Tensor, labels_C: Tensor) -> VocabularyTerms:
        """See `VocabularyTerms`; the loss is that of the whole vocabulary, equal on every rank."""
        scores_CV = logits_CV.float()
        width = scores_CV.shape[1]
        valid_C1 = (labels_C >= 0)[:, None]
        target_C1 = labels_C[:, None] - self._tp.rank * width
        # Of all ranks, exactly the one that holds the column of a valid label finds it.
        is_target_CV = torch.arange(width, device=scores_CV.device)[None, :] == target_C1
        top_C1 = all_reduce(scores_CV.amax(dim=1, keepdim=True), self._tp, "max")
        scores_CV = scores_CV - top_C1
        sums = torch.stack((scores_CV.exp().sum(dim=1), scores_CV.masked_fill(~is_target_CV, 0.0).sum(dim=1)))
        total_C, target_score_C = all_reduce(sums, self._tp)
        log_sum_C1 = total_C.log()[:, None]
        grad_CV = ((scores_CV - log_sum_C1).exp() - is_target_CV.float()) * valid_C1
        loss_C1 = (log_sum_C1 - target_score_C[:, None]) * valid_C1
        return VocabularyTerms(loss_C1.sum(), grad_CV.to(logits_CV.dtype))
