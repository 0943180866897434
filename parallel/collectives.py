"""Collectives that autograd knows, on one axis of the mesh. Each takes and returns plain tensors and waits for its result.

torch has such functions too (`torch.distributed._functional_collectives`), but they return tensors of a lazy type that a
compiled region may take for something else (its gradient is then lost without a word). Called below are the operators
under those: torch.compile sees them, and on CUDA its asynchronous tensor parallelism finds them.

On an axis of one rank every function returns its input and talks to nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.mesh import Axis

_ops = torch.ops._c10d_functional


def all_gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Every rank's `x`, side by side along `dim` in the order of the axis. Backward: reduce-scatter of the gradients.

    For a rank's part of a whole that all ranks then use in different ways. Every rank of the axis calls it, in forward
    and in backward.
    """
    return _AllGather.apply(x, axis, dim) if axis.is_split else x


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's slice along `dim` of the sum of every rank's `x`. Backward: all-gather of the gradients.

    For summands of a whole, of which each rank then needs a part. Every rank of the axis calls it, in forward and backward.
    """
    return _ReduceScatter.apply(x, axis, dim) if axis.is_split else x


def all_to_all(x: Tensor, axis: Axis, *, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """Sends `send[i]` rows of `x` to rank i of the axis, and returns the `receive[i]` rows from each, in order.

    Backward: the same the other way round. Every rank of the axis calls it, in forward and in backward.
    """
    if not axis.is_split:
        return x
    result: Tensor = _AllToAll.apply(x, axis, tuple(send), tuple(receive))
    return result


@torch.no_grad()
def all_reduce(x: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """The sum (or "max") over the axis of numbers without a gradient, as a new tensor. Every rank of the axis calls it."""
    if not axis.is_split:
        return x
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), op, _name(axis)))


def _name(axis: Axis) -> str:
    assert axis.group is not None
    return axis.group.group_name


def _gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    gathered = _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), axis.size, _name(axis)))
    return gathered if dim == 0 else torch.cat(gathered.chunk(axis.size), dim=dim)


def _scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    stacked = x if dim == 0 else torch.cat(x.chunk(axis.size, dim=dim))
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(stacked.contiguous(), "sum", axis.size, _name(axis)))


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _gather(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _scatter(grads[0], ctx.axis, ctx.dim), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _scatter(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grads[0], ctx.axis, ctx.dim), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, send: tuple[int, ...], receive: tuple[int, ...]) -> Tensor:
        ctx.axis, ctx.send, ctx.receive = axis, send, receive
        return _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), list(receive), list(send), _name(axis)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0].contiguous()
        back = _ops.all_to_all_single(grad, list(ctx.send), list(ctx.receive), _name(ctx.axis))
        return _ops.wait_tensor(back), None, None, None
