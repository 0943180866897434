"""Data parallelism: the same model on every rank, each with its own samples, gradients SUMMED over ranks.

The sum, not the mean: a loss here is a sum over tokens divided by the GLOBAL number of valid tokens, so the ranks'
gradients already are parts of one whole. Three engines with one face (`DataParallel`): plain tensors whose gradients are
summed after the last backward (a process alone has nothing to sum), torch's DistributedDataParallel, and FSDP2
(`fully_shard`).
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from parallel.config import DataEngine
from parallel.errors import ParallelError
from parallel.gradients import (
    GradientSums,
    PlacedParameter,
    clip_global_norm,
    copy_to_twins,
    move_twins_gradients,
    placed_parameters,
)
from parallel.mesh import Mesh
from parallel.placement import Placement

UnitPredicate = Callable[[str, nn.Module], bool]
Placements = Mapping[str, Placement]


def _no_module(name: str, module: nn.Module) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Units:
    """Which modules FSDP2 treats in what way; each predicate is asked with a module's name and the module.

    `is_unit`: its parameters are gathered in one piece, just before it runs (a decoder's blocks). `is_expert`: its
    parameters lie on the experts' grid. `is_full_precision`: small modules (norms, routers) that compute in their
    parameters' own type whatever the rest does, as all do under DDP.
    """

    is_unit: UnitPredicate
    is_expert: UnitPredicate = _no_module
    is_full_precision: UnitPredicate = _no_module


class DataParallel:
    """A rank's parts of a model, whose gradients are summed over the data-parallel ranks. There is one part, unless a
    pipeline has given this rank several stages.

    This base is the engine that holds plain tensors and sums gradients after the last backward. `module` is what to call in
    the forward of a model in one part; `model` is that model itself, for its names and state.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        *,
        mesh: Mesh,
        placements: Placements,
        engine_sums_data: bool = False,
        reduce_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.parts = tuple(parts)
        self.mesh = mesh
        self.placements = placements
        self._sums = GradientSums(mesh, engine_sums_data=engine_sums_data, reduce_dtype=reduce_dtype)

    @property
    def model(self) -> nn.Module:
        """The model of a rank that holds it in one part."""
        (model,) = self.parts
        return model

    @property
    def module(self) -> nn.Module:
        """What to call in its forward."""
        return self.model

    def parameters(self) -> list[PlacedParameter]:
        """This rank's parameters with their names and placements. After the model is materialised."""
        return placed_parameters(self.parts, self.placements)

    @contextmanager
    def micro_step(self, *, is_last: bool) -> Iterator[None]:
        """Surrounds forward and backward of one micro batch, or of all that a pipeline has in flight. After the last
        one of a step gradients are summed; the earlier ones only accumulate. Every rank enters it with the same `is_last`.
        """
        with self._engine_step(is_last):
            yield
        if is_last:
            move_twins_gradients(self.parts)
            self._sums.finish(self.parameters())

    def backward(self, loss: Tensor) -> None:
        """The backward of one micro batch."""
        loss.backward()

    def after_update(self) -> None:
        """What must follow every change of the parameters: an optimizer's step, or loading."""
        copy_to_twins(self.parts)

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """See `clip_global_norm`. Every rank must call it, after the last micro step."""
        return clip_global_norm(self.mesh, self.parameters(), max_norm)

    def close(self) -> None:
        """Gives back what the engine holds beside the model."""

    def _engine_step(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext()


class _Replicated(DataParallel):
    """DistributedDataParallel: the whole model on every rank."""

    def __init__(self, model: nn.Module, *, mesh: Mesh, placements: Placements, reduce_dtype: torch.dtype) -> None:
        super().__init__([model], mesh=mesh, placements=placements, engine_sums_data=True)
        group = mesh.axis("dp_replicate", "dp_shard", "cp").group
        assert group is not None
        # Buffers are a pure function of the step here, or are reduced by whoever changes them. torch 2.13 renamed this.
        known = inspect.signature(DistributedDataParallel).parameters
        no_sync: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
        }
        self._wrapped = DistributedDataParallel(
            model,
            process_group=group,
            **no_sync,
            gradient_as_bucket_view=True,
            # DDP regroups its buckets after the first backward, in the order in which gradients arrived. On three
            # ranks and more that changes the order of summation, so a resumed run (whose first step is "first" again)
            # would differ in the last bits from one that never stopped. This is the switch that keeps the buckets.
            # It also lets a parameter go without a gradient where the loss does not depend on it. torch warns once, on
            # stderr, that the switch costs a walk over the graph: a launcher silences it with TORCH_CPP_LOG_LEVEL.
            find_unused_parameters=True,
        )
        self._wrapped.register_comm_hook(group, _sum_in(reduce_dtype))

    @property
    def module(self) -> nn.Module:
        return self._wrapped

    def _engine_step(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext() if is_last else self._wrapped.no_sync()


class _Sharded(DataParallel):
    """FSDP2: parameters, gradients and optimizer state sharded over the ranks, gathered unit by unit.

    Parameters that compute in full precision are out of this: every rank holds them whole, and their gradients are summed
    in one piece at the end of a step.
    """

    def __init__(
        self, parts: Sequence[nn.Module], *, mesh: Mesh, placements: Placements, reduce_dtype: torch.dtype
    ) -> None:
        super().__init__(parts, mesh=mesh, placements=placements, reduce_dtype=reduce_dtype)
        for module in self._sharded_modules():
            module.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum, which a divide factor would otherwise use.
            module.set_force_sum_reduction_for_comms(True)

    @contextmanager
    def _engine_step(self, is_last: bool) -> Iterator[None]:
        for part in self.parts:
            assert isinstance(part, FSDPModule)
            part.set_requires_gradient_sync(is_last)
            part.set_is_last_backward(is_last)
        yield

    def _sharded_modules(self) -> Iterator[FSDPModule]:
        for part in self.parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    yield module


def wrap(
    parts: Sequence[nn.Module],
    *,
    mesh: Mesh,
    placements: Placements,
    engine: DataEngine,
    units: Units,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> DataParallel:
    """Spreads a rank's parts of a model over the data axes of `mesh`. A collective.

    `placements` says where each parameter lies in the whole (see `cut_modules`); whatever is not in it is whole.
    `param_dtype` (FSDP2 only) gathers and computes in that type, and keeps and steps parameters in their own.
    `reduce_dtype` is the type in which gradients are summed over ranks. `cpu_offload` (FSDP2 only) keeps shards, their
    gradients and so the optimizer's state in CPU memory. A model on meta (to be given memory and values
    afterwards) is taken by all but DistributedDataParallel.

    With a `param_dtype`, FSDP2 leaves full-precision modules alone: plain tensors, whole and equal on every rank. So an
    optimizer that cannot take plain and sharded tensors in one group (a fused one) needs two groups.

    Raises `ParallelError` where the engine cannot do what is asked.
    """
    if engine == "fsdp2" and _has_something_to_shard(parts, mesh, units):
        return _shard(parts, mesh, placements, units, param_dtype, reduce_dtype, reshard_after_forward, cpu_offload)
    if engine == "ddp" and param_dtype is not None:
        raise ParallelError('data_engine "ddp" has no param_dtype: compute under autocast, or use "fsdp2"')
    layout = mesh.layout
    if layout.pp == layout.tp == layout.ep == layout.expert_tp == 1 and mesh.world.world_size > 1:
        if any(parameter.is_meta for parameter in parts[0].parameters()):
            raise ParallelError('data_engine "ddp" needs a materialised model, and this one is on meta')
        return _Replicated(parts[0], mesh=mesh, placements=placements, reduce_dtype=reduce_dtype)
    # DDP knows one group of ranks, and here experts and the rest have different ones.
    return DataParallel(parts, mesh=mesh, placements=placements, reduce_dtype=reduce_dtype)


def _has_something_to_shard(parts: Sequence[nn.Module], mesh: Mesh, units: Units) -> bool:
    """Whether any parameter is held by more than one rank of its data axes."""
    experts = any(_named_by(units.is_expert, part) for part in parts)
    return mesh.size("dp_replicate", "dp_shard", "cp") > 1 or (experts and mesh.size("edp_shard") > 1)


def _shard(
    parts: Sequence[nn.Module],
    mesh: Mesh,
    placements: Placements,
    units: Units,
    param_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
    cpu_offload: bool,
) -> DataParallel:
    """Applies `fully_shard`, inner units before those around them."""
    on_cuda = mesh.world.device.type == "cuda"
    options: dict[str, Any] = {
        # Inputs stay as they are: a float32 table of positions must not be rounded because weights are.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=on_cuda) if cpu_offload else OffloadPolicy(),
        "reshard_after_forward": reshard_after_forward,
    }
    outer = [("dp_replicate",)] if mesh.size("dp_replicate") > 1 else []
    dense_mesh = mesh.device_mesh(*outer, ("dp_shard", "cp"))
    # The experts' grid is that of the rest unless experts, or the sequence between blocks, are spread otherwise.
    own_grid = mesh.size("ep", "expert_tp", "tp") > 1
    expert_mesh = mesh.device_mesh(*outer, ("edp_shard",)) if own_grid else dense_mesh
    for part in parts:
        inner = _named_by(units.is_unit, part)
        if not inner:
            raise ParallelError(
                'data_engine "fsdp2": no module of the model is a unit, so all of it would be gathered at once'
            )
        # Not units of their own: dozens of tiny all-gathers, and hooks inside a block's forward, which torch.compile
        # cannot see through. All norms and routers of the largest models are 0.02% of their parameters.
        in_two_types = len({parameter.dtype for parameter in part.parameters()}) > 1
        apart = _named_by(units.is_full_precision, part) if param_dtype is not None or in_two_types else []
        ignored = {parameter for module in apart for parameter in module.parameters()}
        stacks = _named_by(units.is_expert, part)
        of_experts = {parameter for experts in stacks for parameter in experts.parameters()}
        options["shard_placement_fn"] = _evenly(of_experts, mesh.size("edp_shard"))
        for experts in stacks if own_grid else []:
            if mesh.size("dp_replicate", "edp_shard") > 1 or cpu_offload:
                fully_shard(experts, mesh=expert_mesh, **options)
            else:  # no other rank has these: gathering them from a group of one would only copy them
                ignored.update(experts.parameters())
        for module in (*reversed(inner), part):  # an inner unit before the one around it
            fully_shard(module, mesh=dense_mesh, ignored_params=ignored, **options)
        for parameter in ignored:  # fully_shard brings all others to the mesh's device
            if not parameter.is_meta:
                parameter.data = parameter.data.to(mesh.world.device)
    return _Sharded(parts, mesh=mesh, placements=placements, reduce_dtype=reduce_dtype)


def _evenly(experts: set[nn.Parameter], ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """A stack of few experts over many ranks is sharded along its next dim, where that can be done evenly: else few ranks
    would hold all of it."""

    def placement(parameter: nn.Parameter) -> Shard | None:
        inside = parameter in experts and parameter.shape[0] % ranks != 0 and parameter.shape[1] % ranks == 0
        return Shard(1) if inside else None

    return placement


def _named_by(predicate: UnitPredicate, model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name and predicate(name, module)]


def _sum_in(
    dtype: torch.dtype,
) -> Callable[[dist.ProcessGroup, dist.GradBucket], torch.futures.Future[torch.Tensor]]:
    """A hook that sums one bucket of gradients over the data axis (all-reduce) in `dtype`, where DDP would take the mean."""

    def hook(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        work = dist.all_reduce(buffer.to(dtype), group=group, async_op=True)
        if buffer.dtype == dtype:
            return work.get_future().then(lambda done: done.value()[0])
        return work.get_future().then(lambda done: buffer.copy_(done.value()[0]))

    return hook
