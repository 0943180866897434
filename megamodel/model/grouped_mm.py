"""Products of consecutive groups of rows, each group with a matrix of its own.

Shape suffixes: R rows of all groups, K width of a row, N width of a result, E groups (experts).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def grouped_mm(x_RK: Tensor, w_EKN: Tensor, ends_E: Tensor) -> Tensor:
    """Rows ends_E[e - 1] .. ends_E[e] of x times w[e]: (R, N) in the dtype of x. ends_E: int32, the last one is R."""
    if x_RK.dtype == torch.bfloat16:
        return torch._grouped_mm(x_RK, w_EKN, ends_E)
    return _any_dtype(x_RK, w_EKN, ends_E)


# torch.compile refuses torch._grouped_mm in other types than bfloat16, though it runs in them: an operator of our own tells
# the compiler the result's shape, and hides what is inside.
@torch.library.custom_op("mega::grouped_mm", mutates_args=())
def _any_dtype(x_RK: Tensor, w_EKN: Tensor, ends_E: Tensor) -> Tensor:
    return torch._grouped_mm(x_RK, w_EKN, ends_E)


@_any_dtype.register_fake
def _(x_RK: Tensor, w_EKN: Tensor, ends_E: Tensor) -> Tensor:
    return x_RK.new_empty(x_RK.shape[0], w_EKN.shape[2])


@torch.library.custom_op("mega::grouped_mm_weight_grad", mutates_args=())
def _weight_grad(x_RK: Tensor, grad_RN: Tensor, ends_E: Tensor) -> Tensor:
    return torch._grouped_mm(x_RK.t(), grad_RN, ends_E)


@_weight_grad.register_fake
def _(x_RK: Tensor, grad_RN: Tensor, ends_E: Tensor) -> Tensor:
    return x_RK.new_empty(ends_E.shape[0], x_RK.shape[1], grad_RN.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor, Tensor, None]:
    x_RK, w_EKN, ends_E = ctx.saved_tensors
    grad_RN = grad_RN.contiguous()
    return _any_dtype(grad_RN, w_EKN.mT, ends_E), _weight_grad(x_RK, grad_RN, ends_E), None


_any_dtype.register_autograd(_backward, setup_context=_save)
