"""A model and its optimizers as checkpoint entries, named by the model's own parameter names.

So a checkpoint fits any layout: the wrappers of DDP and compile leave no trace in the names, each rank's tensors say where
they lie in the whole, and an optimizer's state hangs on its parameter's name, not on its number in a list.
Hyperparameters are not part of it: they come from the run's configuration and its schedule, so a checkpoint never
overrules them in silence.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from parallel.checkpoint.directory import CheckpointInfo
from parallel.checkpoint.fit import SavedTensor
from parallel.checkpoint.store import CheckpointStore, LoadedState
from parallel.errors import ParallelError
from parallel.placement import Placement, piece_of

_COMPILED = "_orig_mod."


@dataclass(frozen=True, kw_only=True)
class ModelTensor:
    """This rank's part of a parameter or buffer, and where it lies in the whole.

    `twins` are further tensors of the same name and content: a tied embedding in two stages that one rank holds.
    """

    tensor: Tensor
    placement: Placement
    twins: tuple[Tensor, ...] = ()

    def placed(self, value: Any) -> Any:
        """The piece that a tensor of this one's shape (itself, or an optimizer's moment) is; else `value` as it is."""
        if isinstance(value, Tensor) and value.shape == self.tensor.shape:
            return piece_of(value, self.placement)
        return value


def model_tensors(modules: Sequence[nn.Module], placements: Mapping[str, Placement]) -> dict[str, ModelTensor]:
    """What a checkpoint keeps of a model: parameters and persistent buffers by their names, without those of wrappers.

    `modules` are the parts of the model that this rank holds, under the names that they have in the whole model;
    `placements`, by the same names, say where their tensors lie. A tensor without one is a whole. One with two names
    (tied) is there once. Ask anew for each save: FSDP2 shows its shards only when asked.
    """
    found: dict[str, ModelTensor] = {}
    seen: set[Tensor] = set()
    for module in modules:
        bare = module.module if isinstance(module, DistributedDataParallel) else module
        kept = bare.state_dict()  # first: it makes FSDP2 present its shards
        own = dict([*bare.named_parameters(remove_duplicate=False), *bare.named_buffers(remove_duplicate=False)])
        for full_name in kept:
            name, tensor = full_name.replace(_COMPILED, ""), own[full_name]
            if tensor in seen:
                continue
            seen.add(tensor)
            if name in found:
                found[name] = replace(found[name], twins=(*found[name].twins, tensor))
                continue
            placement = placements.get(name) or Placement(shape=tensor.shape)
            assert tensor.shape == placement.local_shape, (name, tensor.shape, placement)
            found[name] = ModelTensor(tensor=tensor, placement=placement)
    return found


def training_state(tensors: Mapping[str, ModelTensor], optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """`{"model": {name: piece}, "optimizer": {parameter name: {entry: value}}}`, sharing memory with both.

    An optimizer's entries of their parameter's shape are pieces as the parameter is; others (a counter of steps) stay
    what they are, and are the same on all ranks. Raises `ParallelError` when an optimizer steps a parameter that is
    not the model's.
    """
    optimizer_state: dict[str, dict[str, Any]] = {}
    for optimizer, names in _with_names(tensors, optimizers):
        for parameter, name in names.items():
            if entries := optimizer.state.get(parameter):
                placed = {entry: tensors[name].placed(value) for entry, value in entries.items()}
                optimizer_state.setdefault(name, placed)
    return {"model": _model_state(tensors), "optimizer": optimizer_state}


def load_training_state(
    store: CheckpointStore,
    info: CheckpointInfo,
    tensors: Mapping[str, ModelTensor],
    optimizers: Sequence[Optimizer],
    *,
    others: Mapping[str, Any] | None = None,
) -> LoadedState:
    """Loads what `training_state` gave under any layout, and the `others` saved beside it, into model and optimizers.

    A collective over the store's world. Optimizers may be fresh: their state is made as the checkpoint has it. The
    result has the loaded `others`. Raises `CheckpointError` when the checkpoint does not fit the model.
    """
    named = _with_names(tensors, optimizers)
    stepped = {name: tensors[name] for _, names in named for name in names.values()}
    entries = _allocate(store.contents(info), stepped)
    placed = {
        name: {entry: stepped[name].placed(value) for entry, value in values.items()}
        for name, values in entries.items()
    }
    loaded = store.load(info, {"model": _model_state(tensors), "optimizer": placed, **(others or {})})
    with torch.no_grad():
        for held in tensors.values():
            for twin in held.twins:
                twin.copy_(held.tensor)
    for optimizer, names in named:
        # load_state_dict numbers parameters in the order of the groups, and brings each entry to the device and type
        # on which the optimizer wants it.
        numbers = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
        state = {
            numbers[parameter]: _own(
                entries[name], loaded.state["optimizer"][name], parameter is not tensors[name].tensor
            )
            for parameter, name in names.items()
            if name in entries
        }
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    rest = {key: value for key, value in loaded.state.items() if key in (others or {})}
    return LoadedState(state=rest, missing=loaded.missing)


def _model_state(tensors: Mapping[str, ModelTensor]) -> dict[str, Any]:
    return {name: held.placed(held.tensor) for name, held in tensors.items()}


def _own(allocated: Mapping[str, Tensor | None], loaded: Mapping[str, Any], is_twin: bool) -> dict[str, Any]:
    """The loaded entries of one parameter: the tensors that were filled, and the objects. A twin gets copies."""
    entries = {entry: loaded[entry] if value is None else value for entry, value in allocated.items()}
    return copy.deepcopy(entries) if is_twin else entries


def _with_names(
    tensors: Mapping[str, ModelTensor], optimizers: Sequence[Optimizer]
) -> list[tuple[Optimizer, dict[Tensor, str]]]:
    """Each optimizer with the names of the parameters that it steps."""
    names = {tensor: name for name, held in tensors.items() for tensor in (held.tensor, *held.twins)}
    named = []
    for optimizer in optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        unknown = sum(parameter not in names for parameter in parameters)
        if unknown:
            raise ParallelError(
                f"{type(optimizer).__name__} steps {unknown} parameters that are not the model's: "
                "make optimizers after the model has been sharded"
            )
        named.append((optimizer, {parameter: names[parameter] for parameter in parameters}))
    return named


def _allocate(
    saved: Mapping[str, SavedTensor | None], stepped: Mapping[str, ModelTensor]
) -> dict[str, dict[str, Tensor | None]]:
    """Room for the optimizer state of a checkpoint: cut as its parameter is, where it has the parameter's whole shape.
    None stands for an object."""
    state: dict[str, dict[str, Tensor | None]] = {}
    for key, entry in saved.items():
        name, _, part = key.removeprefix("optimizer.").rpartition(".")
        if not key.startswith("optimizer.") or name not in stepped:
            continue
        value: Tensor | None = None
        if entry is not None and entry.shape == stepped[name].placement.shape:
            value = torch.zeros_like(stepped[name].tensor.detach(), dtype=entry.dtype)
        elif entry is not None:
            value = torch.zeros(entry.shape, dtype=entry.dtype)
        state.setdefault(name, {})[part] = value
    return state
