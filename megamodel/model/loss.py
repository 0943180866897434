"""Cross-entropy over a large vocabulary without ever holding the logits of the whole batch.

Shape suffixes: T tokens, C tokens of one chunk, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ChunkTerms(NamedTuple):
    """One chunk's part of the loss, and the gradient of it with respect to the chunk's logits."""

    loss_sum: Tensor
    grad_CV: Tensor


def chunk_terms(logits_CV: Tensor, labels_C: Tensor) -> ChunkTerms:
    """Cross-entropy in float32, summed over labels >= 0, and softmax minus one-hot in the dtype of the logits."""
    valid_C1 = (labels_C >= 0)[:, None]
    target_C1 = labels_C.clamp_min(0)[:, None]
    scores_CV = logits_CV.float()
    log_sum_C1 = scores_CV.logsumexp(dim=-1, keepdim=True)
    loss_C1 = log_sum_C1 - scores_CV.gather(1, target_C1)
    is_target_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device)[None, :] == target_C1
    grad_CV = ((scores_CV - log_sum_C1).exp() - is_target_CV.float()) * valid_C1
    return ChunkTerms((loss_C1 * valid_C1).sum(), grad_CV.to(logits_CV.dtype))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Makes each chunk's logits once, and its gradients with them, so the backward neither keeps nor remakes logits."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, w_VD: Tensor, labels_T: Tensor, chunk: int, terms: Callable[..., ChunkTerms]
    ) -> Tensor:
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        weight_VD = w_VD.to(x_TD.dtype)
        total = torch.zeros((), dtype=torch.float32, device=x_TD.device)
        grad_x_TD = torch.empty_like(x_TD) if needs_grad else None
        grad_w_VD = torch.zeros_like(w_VD, dtype=torch.float32) if needs_grad else None
        for start in range(0, x_TD.shape[0], chunk):
            x_CD, labels_C = x_TD[start : start + chunk], labels_T[start : start + chunk]
            loss_sum, grad_CV = terms(x_CD @ weight_VD.t(), labels_C)
            total += loss_sum
            if grad_x_TD is not None and grad_w_VD is not None:
                torch.mm(grad_CV, weight_VD, out=grad_x_TD[start : start + chunk])
                grad_w_VD += grad_CV.t() @ x_CD
        if grad_x_TD is not None and grad_w_VD is not None:
            ctx.save_for_backward(grad_x_TD, grad_w_VD)
            ctx.weight_dtype = w_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_x_TD, grad_w_VD = ctx.saved_tensors
        # The factor (one over the number of tokens) stays float32: rounded, it would scale both gradients, and unequally.
        grad_x_TD = (grad_x_TD.float() * grads[0]).to(grad_x_TD.dtype)
        return grad_x_TD, (grad_w_VD * grads[0]).to(ctx.weight_dtype), None, None, None


class ChunkedTokenLoss:
    """`TokenLoss` of one process: peak memory is that of a chunk of rows of logits, not of the batch.

    A chunk has at most `max_rows` rows and about `max_logits` numbers. `terms` is `chunk_terms`, or a compiled version of
    it, which passes over the logits fewer times.
    """

    def __init__(
        self, *, max_rows: int = 1024, max_logits: int = 2**25, terms: Callable[..., ChunkTerms] = chunk_terms
    ) -> None:
        self.max_rows = max_rows
        self.max_logits = max_logits
        self.terms = terms

    def __call__(self, x_TD: Tensor, w_VD: Tensor, labels_T: Tensor) -> Tensor:
        """Sum of -log softmax(x w^T)[label] over tokens with label >= 0, in nats (float32 scalar)."""
        chunk = min(self.max_rows, max(1, self.max_logits // w_VD.shape[0]))
        total: Tensor = _ChunkedCrossEntropy.apply(x_TD, w_VD, labels_T, chunk, self.terms)
        return total
