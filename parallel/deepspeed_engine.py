"""DeepSpeed as an engine of data parallelism: ZeRO stages 1 to 3 (Rajbhandari et al. 2020), with offload to CPU and NVMe.

It has the face of `DataParallel`, and one thing more: DeepSpeed owns the optimizer, so `step` and `discard` are asked of the
engine. All ranks of the world are its data ranks.

DeepSpeed takes the mean of gradients over ranks; here it is told to take their sum (stages 1 and 2), or the loss is
multiplied by the number of ranks (stage 3, where it has no such setting).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from parallel.config import DeepSpeedConfig
from parallel.data_parallel import DataParallel, UnitPredicate
from parallel.deepspeed_setup import (
    check_deepspeed,
    deepspeed_environment,
    deepspeed_settings,
    import_deepspeed,
    start_afresh,
)
from parallel.errors import ParallelError
from parallel.gradients import placed_parameters
from parallel.mesh import Mesh

_INVALID = -1.0
"""What DeepSpeed calls the norm of gradients that are not finite."""


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """Whole fp32 tensors by parameter name: weights, and each entry of the optimizer's state (AdamW: `exp_avg`,
    `exp_avg_sq`, `step`). The mappings may be lazy: each name is asked for once, in the model's order."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]]


def wrap_deepspeed(
    model: nn.Module,
    *,
    mesh: Mesh,
    config: DeepSpeedConfig,
    optimizer: Optimizer,
    compute_dtype: torch.dtype = torch.float32,
    reduce_dtype: torch.dtype = torch.float32,
    is_unit: UnitPredicate | None = None,
) -> DeepSpeedParallel:
    """Hands `model` and `optimizer` over to DeepSpeed, which shards them over all ranks. A collective.

    `model` is materialised, with the same fp32 weights on every rank; `optimizer` is an AdamW of its parameters, whose
    learning rates are the peak ones. From here on only the engine may step it. With `compute_dtype` bf16, stages 2 and 3
    keep bf16 weights for compute beside sharded fp32 ones; stage 1 computes with fp32 weights, as the model casts them.
    Gradients are accumulated in fp32, and summed over ranks in `reduce_dtype`. `is_unit(name, module)` names the modules
    that stage 3 gathers in one piece (a decoder's blocks); without it every layer inside is gathered by itself, by hooks
    that torch.compile cannot see through.

    Raises `ParallelError` where DeepSpeed is missing or cannot do what is asked.
    """
    world = mesh.world
    _check_model(model, mesh, optimizer)
    check_deepspeed(config, world.device)
    named = placed_parameters([model], {})
    placements = {placed.name: placed.placement for placed in named}
    numel = sum(placement.shape.numel() for placement in placements.values())
    settings = deepspeed_settings(config, numel, compute_dtype, reduce_dtype, world.device)
    # DeepSpeed rounds weights to bf16 before it copies them to fp32.
    whole = {p.name: p.parameter.detach().to("cpu", copy=True) for p in named if "bf16" in settings}
    with deepspeed_environment(DS_ACCELERATOR=world.device.type, LOCAL_RANK=str(world.local_rank)):
        deepspeed = import_deepspeed(world.device)
        start_afresh()
        for name, module in model.named_modules():
            if is_unit is not None and is_unit(name, module):
                importlib.import_module("deepspeed.utils").set_z3_leaf_module(module, True)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    parallel = DeepSpeedParallel([model], mesh=mesh, placements=placements, engine_sums_data=True)
    parallel.take(engine, optimizer, stage=config.zero_stage)
    if whole:
        parallel.import_state(EngineState(model=whole, optimizer={}))
    return parallel


class DeepSpeedParallel(DataParallel):
    """A model, and its optimizer, in the hands of DeepSpeed.

    Every step: micro steps, each a forward of `module` and `backward`; then `clip_grad_norm`; then `step` or `discard`. All
    methods are collectives over the world.
    """

    def take(self, engine: Any, optimizer: Optimizer, *, stage: int) -> None:
        """What `wrap_deepspeed` has made."""
        self._engine = engine
        self._zero = engine.optimizer
        self._optimizer = optimizer
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        self._sharded = stage == 3
        self._loss_factor = self.mesh.world.world_size if self._sharded else 1
        self._norms: list[Tensor] | None = None

    @property
    def module(self) -> nn.Module:
        """DeepSpeed's engine."""
        return self._engine

    @contextmanager
    def micro_step(self, *, is_last: bool) -> Iterator[None]:
        """See `DataParallel`. Stage 1 sums gradients in the last micro step alone, stages 2 and 3 in each."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        """The backward of one micro batch."""
        self._engine.backward(loss * self._loss_factor, scale_wrt_gas=False)

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """The global 2-norm of the gradient, as it is; NaN if any gradient is not finite. `step` will clip to `max_norm`."""
        self._zero.clip_grad = 0.0 if math.isinf(max_norm) else max_norm
        if self._sharded:
            # What the optimizer's step does before it asks for norms.
            self._zero._pre_step()
            self._zero._partition_all_parameters()
            self._norms = self._zero._get_norm_groups()
        else:
            self._zero._wait_for_offload_copies()
            self._norms = [self._zero.scaled_global_norm()]
        norms = torch.stack([norm.double().to(self.mesh.world.device) for norm in self._norms])
        valid = (norms.isfinite() & (norms >= 0)).all()
        return torch.where(valid, torch.linalg.vector_norm(norms), float("nan")).float()

    def step(self, lr_factor: float) -> None:
        """Updates every parameter at `lr_factor` times its peak learning rate, and drops all gradients.

        DeepSpeed itself takes no step, and drops them, if the norm is not finite.
        """
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * lr_factor
        norms, self._norms = self._norms, None
        assert norms is not None, "clip_grad_norm comes before step"
        with self._answering(norms):
            self._engine.step()

    def discard(self) -> None:
        """Drops all gradients and updates nothing."""
        invalid = torch.tensor(_INVALID, device=self.mesh.world.device)
        self._norms = None
        with self._answering([invalid]):
            self._engine.step()

    @contextmanager
    def _answering(self, norms: list[Tensor]) -> Iterator[None]:
        """DeepSpeed's step measures the norm, all ranks together. It has been measured: this is what it gets instead."""
        name = "_get_norm_groups" if self._sharded else "scaled_global_norm"
        setattr(self._zero, name, lambda: norms if self._sharded else norms[0])
        try:
            yield
        finally:
            delattr(self._zero, name)

    @torch.no_grad()
    def export_state(self) -> EngineState:
        """Whole tensors in CPU memory, of this rank's share of the parameters: all ranks' shares together are all of them.

        Gathered parameter by parameter, so that no rank holds more than its share and one more. Before the first step the
        optimizer has no state.
        """
        world = self.mesh.world
        entries, step = self._moments()
        self._link_moments()
        sizes = [0] * world.world_size
        model: dict[str, Tensor] = {}
        optimizer: dict[str, Mapping[str, Tensor]] = {}
        for placed in self.parameters():
            owner = sizes.index(min(sizes))
            sizes[owner] += placed.placement.shape.numel()
            gathered = {entry: self._gather(placed.parameter, entry, owner) for entry in ("", *entries)}
            if owner == world.rank:
                model[placed.name] = gathered.pop("")
                if entries:
                    optimizer[placed.name] = {**gathered, "step": step.clone()}
        return EngineState(model=model, optimizer=optimizer)

    @torch.no_grad()
    def import_state(self, state: EngineState) -> None:
        """Takes over whole tensors, of every parameter and the same on every rank. Without any optimizer state it starts
        afresh. Raises `ParallelError` if the state does not fit."""
        parameters = self.parameters()
        entries: list[str] = []
        steps: set[float] = set()
        for placed in parameters:
            entry_values = state.optimizer.get(placed.name, {})
            if placed is parameters[0]:
                entries = sorted(entry_values.keys() - {"step"})
                self._reset_moments(entries)
            if sorted(entry_values.keys() - {"step"}) != entries:
                raise ParallelError(
                    f"optimizer state of {placed.name} has the entries {sorted(entry_values)}, and that of "
                    f"{parameters[0].name} {[*entries, 'step']}: DeepSpeed steps all parameters by one rule"
                )
            self._scatter(placed.parameter, "", state.model[placed.name])
            for entry in entries:
                self._scatter(placed.parameter, entry, entry_values[entry])
            if entries:
                steps.add(float(entry_values["step"]))
        if len(steps) > 1:
            raise ParallelError(
                f"optimizer state counts {sorted(steps)} steps for different parameters, and DeepSpeed has one count for all"
            )
        for step in steps:
            for flat in self._flat_parameters():
                self._optimizer.state[flat]["step"].fill_(step)
        if not self._sharded:
            self._zero.update_lp_params()

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the model and frees its buffers."""
        self._engine.destroy()

    def _flat_parameters(self) -> list[Tensor]:
        """What the optimizer steps: this rank's part of each group of parameters, flattened."""
        return self._zero.fp32_partitioned_groups_flat if self._sharded else self._zero.single_partition_of_fp32_groups

    def _moments(self) -> tuple[list[str], Tensor]:
        """Names of the optimizer's tensors, none before the first step, and the count of steps."""
        state = self._optimizer.state.get(self._flat_parameters()[0], {})
        return sorted(state.keys() - {"step"}), state.get("step", torch.zeros(())).cpu()

    def _reset_moments(self, entries: list[str]) -> None:
        """Zeros for all `entries`, as AdamW would make in its first step."""
        for group_index, flat in enumerate(self._flat_parameters()):
            swapped = self._sharded and self._zero._swappable_optimizer_subgroup(group_index)
            if swapped:
                self._zero._optimizer_states_and_gradient_swap_in(group_index)
            self._optimizer.state[flat].clear()
            if entries:
                self._optimizer.state[flat].update({entry: torch.zeros_like(flat) for entry in entries})
                self._optimizer.state[flat]["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            if swapped:
                self._zero._optimizer_states_and_gradient_swap_out(group_index)
        self._link_moments()

    def _link_moments(self) -> None:
        """Stages 1 and 2: DeepSpeed links parameters to their part of the optimizer's state once the first group has been
        stepped, when the others have no state yet."""
        if not self._sharded and self._moments()[0]:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _gather(self, parameter: nn.Parameter, entry: str, owner: int) -> Tensor:
        """The whole of a parameter ("") or of its optimizer's `entry`, in CPU memory on rank `owner`, empty elsewhere."""
        of = importlib.import_module("deepspeed.utils")
        whole = of.safe_get_full_optimizer_state(parameter, entry) if entry else of.safe_get_full_fp32_param(parameter)
        return whole.to("cpu", copy=True) if owner == self.mesh.world.rank else torch.empty(0)

    def _scatter(self, parameter: nn.Parameter, entry: str, whole: Tensor) -> None:
        """The reverse of `_gather`, from a whole that every rank has."""
        utils = importlib.import_module("deepspeed.utils")
        if not self._sharded:
            if entry:
                utils.safe_set_full_optimizer_state(parameter, whole, entry)
            else:
                utils.safe_set_full_fp32_param(parameter, whole)
            return
        world = self.mesh.world
        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        padded = torch.zeros(size * world.world_size, dtype=whole.dtype)
        padded[: whole.numel()] = whole.flatten()
        local = padded[world.rank * size : (world.rank + 1) * size]
        if entry:
            utils.safe_set_local_optimizer_state(parameter, local, entry)
            return
        utils.safe_set_local_fp32_param(parameter, local)
        with importlib.import_module("deepspeed").zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(whole)


def _check_model(model: nn.Module, mesh: Mesh, optimizer: Optimizer) -> None:
    layout = mesh.layout
    if not layout.pp == layout.tp == layout.ep == layout.expert_tp == 1:
        raise ParallelError('data_engine "deepspeed" goes with data and context parallelism only; use "fsdp2"')
    if mesh.world.backend is None:
        raise ParallelError('data_engine "deepspeed" needs a process group, and this process has none: use a launcher')
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ParallelError('data_engine "deepspeed" needs a materialised model, and this one is on meta')
    if type(optimizer) is not AdamW:
        raise ParallelError(
            f'data_engine "deepspeed" flattens what it shards, and only AdamW may step that, not {type(optimizer).__name__}; '
            'use "fsdp2" for other optimizers'
        )
