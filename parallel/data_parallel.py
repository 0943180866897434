"""Data parallelism: the same model on every rank, each with its own samples, gradients SUMMED over ranks.

The sum, not the mean: a loss here is a sum over tokens divided by the GLOBAL number of valid tokens, so the ranks'
gradients already are parts of one whole. Three engines with one face (`DataParallel`): none for a process alone,
torch's DistributedDataParallel, and FSDP2 (`fully_shard`).
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from parallel.config import DataEngine
from parallel.errors import ParallelError

UnitPredicate = Callable[[str, nn.Module], bool]


class DataParallel:
    """A model whose gradients are summed over the data-parallel ranks. This base is the engine of one process alone.

    `module` is what to call in the forward; `model` is the model itself, for its names, state and parameters.
    """

    def __init__(self, model: nn.Module, module: nn.Module) -> None:
        self.model = model
        self.module = module

    def micro_step(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of one micro batch. The last one of a step sums gradients over the data
        axis during its backward; the earlier ones only accumulate. Every rank must enter it with the same `is_last`.
        """
        return nullcontext()

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> torch.Tensor:
        """Scales all gradients down so that their global 2-norm is at most `max_norm` (`inf`: only measures it).

        Returns the norm before that, a 0-dim tensor, equal on every rank; not finite if any gradient is not. Under
        FSDP2 a collective over the data axis; every rank must call it, after the last micro step.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        # torch computes with sharded tensors or with plain ones, never with both at once.
        kinds = [[p for p in parameters if isinstance(p, DTensor) == sharded] for sharded in (True, False)]
        norms = [
            _whole(nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds if kind
        ]
        norm = norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms)
        if max_norm != float("inf"):
            for kind in kinds:
                nn.utils.clip_grads_with_norm_(kind, max_norm, norm)
        return norm


class _Replicated(DataParallel):
    """DistributedDataParallel: the whole model on every rank."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, reduce_dtype: torch.dtype) -> None:
        # Buffers are a pure function of the step here, or are reduced by whoever changes them. torch 2.13 renamed this.
        known = inspect.signature(DistributedDataParallel).parameters
        no_sync: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
        }
        wrapped = DistributedDataParallel(
            model,
            process_group=mesh.get_group(),
            **no_sync,
            gradient_as_bucket_view=True,
            # DDP regroups its buckets after the first backward, in the order in which gradients arrived. On three
            # ranks and more that changes the order of summation, so a resumed run (whose first step is "first" again)
            # would differ in the last bits from one that never stopped. This is the switch that keeps the buckets.
            # It also lets a parameter go without a gradient where the loss does not depend on it. torch warns once, on
            # stderr, that the switch costs a walk over the graph: a launcher silences it with TORCH_CPP_LOG_LEVEL.
            find_unused_parameters=True,
        )
        hook = _sum_hook if reduce_dtype == torch.float32 else _sum_in(reduce_dtype)
        wrapped.register_comm_hook(mesh.get_group(), hook)
        super().__init__(model, wrapped)
        self._wrapped = wrapped

    def micro_step(self, *, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext() if is_last else self._wrapped.no_sync()


class _Sharded(DataParallel):
    """FSDP2: parameters, gradients and optimizer state sharded over the ranks, gathered unit by unit.

    Parameters of the modules `replicated` are out of this: every rank holds them whole, and their gradients are summed
    in one piece at the end of a step.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, replicated: Sequence[nn.Module]) -> None:
        if not isinstance(model, FSDPModule):
            raise AssertionError("fully_shard must have been applied")
        super().__init__(model, model)
        self._root = model
        self._group = mesh.get_group()
        self._replicated = replicated  # modules, since a model on meta gets new parameters when it is materialised
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                # gloo has no pre-multiplied sum, which a divide factor would otherwise use.
                module.set_force_sum_reduction_for_comms(True)

    @contextmanager
    def micro_step(self, *, is_last: bool) -> Iterator[None]:
        self._root.set_requires_gradient_sync(is_last)
        self._root.set_is_last_backward(is_last)
        yield
        if is_last:
            self._sum_replicated()

    @torch.no_grad()
    def _sum_replicated(self) -> None:
        parameters = _parameters_of(self._replicated)
        if not parameters:
            return
        for parameter in parameters:
            if parameter.grad is None:  # not used on this rank, and perhaps on another
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        summed = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(summed, group=self._group)
        for gradient, part in zip(gradients, summed.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def wrap(
    model: nn.Module,
    *,
    mesh: DeviceMesh | None,
    engine: DataEngine,
    is_unit: UnitPredicate,
    is_full_precision: UnitPredicate | None = None,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
) -> DataParallel:
    """Spreads `model` over the one axis of `mesh`; None means one process, which needs no engine.

    A collective over the mesh. `is_unit(name, module)` names the modules that FSDP2 gathers one at a time (a
    decoder's blocks). `param_dtype` (FSDP2 only) gathers and computes in that type, and keeps and steps parameters in
    their own. `reduce_dtype` is the type in which gradients are summed over ranks. FSDP2 takes a model on meta too
    (then `to_empty` and initialise afterwards), DDP does not.

    `is_full_precision(name, module)` names small modules (norms, routers) that compute in their parameters' own type
    whatever `param_dtype` is, as all do under DDP. With a `param_dtype`, FSDP2 leaves them alone: plain tensors, whole
    and equal on every rank. So an optimizer that cannot take plain and sharded tensors in one group (a fused one)
    needs two groups.

    Raises `ParallelError` where the engine cannot do what is asked.
    """
    if mesh is None:
        return DataParallel(model, model)
    if engine == "ddp":
        if param_dtype is not None:
            raise ParallelError('data_engine "ddp" has no param_dtype: compute under autocast, or use "fsdp2"')
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ParallelError('data_engine "ddp" needs a materialised model, and this one is on meta')
        return _Replicated(model, mesh, reduce_dtype)
    # Inputs stay as they are: a float32 table of positions must not be rounded because weights are.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    units = _named_by(is_unit, model)
    if not units:
        raise ParallelError(
            'data_engine "fsdp2": no module of the model is a unit, so all of it would be gathered at once'
        )
    # Not units of their own: dozens of tiny all-gathers, and hooks inside a block's forward, which torch.compile
    # cannot see through. All norms and routers of the largest models are 0.02% of their parameters.
    replicated = _named_by(is_full_precision, model) if param_dtype is not None and is_full_precision else []
    ignored = set(_parameters_of(replicated))
    for module in (*reversed(units), model):  # an inner unit before the one around it
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=reshard_after_forward,
            ignored_params=ignored,
        )
    for parameter in ignored:  # fully_shard brings all others to the mesh's device
        if not parameter.is_meta:
            parameter.data = parameter.data.to(mesh.device_type)
    return _Sharded(model, mesh, replicated)


def _named_by(predicate: UnitPredicate, model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name and predicate(name, module)]


def _parameters_of(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """All parameters of some modules, each once, in an order that is the same on every rank."""
    return list(dict.fromkeys(parameter for module in modules for parameter in module.parameters()))


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sum_hook(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sums one bucket of gradients over the data axis (all-reduce), where DDP would take the mean."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _sum_in(
    dtype: torch.dtype,
) -> Callable[[dist.ProcessGroup, dist.GradBucket], torch.futures.Future[torch.Tensor]]:
    """As `_sum_hook`, but sent and summed in `dtype`."""

    def hook(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        work = dist.all_reduce(buffer.to(dtype), group=group, async_op=True)
        return work.get_future().then(lambda done: buffer.copy_(done.value()[0]))

    return hook
