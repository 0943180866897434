"""A model and its optimizers as checkpoint entries, named by the model's own parameter names.

So a checkpoint fits any layout: the wrappers of DDP and compile leave no trace in the names, sharded tensors are
DTensors that any number of ranks can read, and an optimizer's state hangs on its parameter's name, not on its number
in a list. Hyperparameters are not part of it: they come from the run's configuration and its schedule, so a
checkpoint never overrules them in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from parallel.checkpoint.directory import CheckpointInfo
from parallel.checkpoint.fit import SavedTensor
from parallel.checkpoint.store import CheckpointStore, LoadedState
from parallel.errors import ParallelError

_COMPILED = "_orig_mod."


def training_state(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """`{"model": {name: tensor}, "optimizer": {parameter name: {entry: value}}}`, sharing memory with both.

    Raises `ParallelError` when an optimizer steps a parameter that is not the model's.
    """
    model_state = _model_state(model)
    optimizer_state = {}
    for optimizer, names in _with_names(model, optimizers):
        for parameter, name in names.items():
            if entries := optimizer.state.get(parameter):
                optimizer_state[name] = dict(entries)
    return {"model": model_state, "optimizer": optimizer_state}


def load_training_state(
    store: CheckpointStore,
    info: CheckpointInfo,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    others: Mapping[str, Any] | None = None,
) -> LoadedState:
    """Loads what `training_state` gave, and the `others` saved beside it, into `model` and `optimizers`.

    A collective over the store's world. Optimizers may be fresh: their state is made as the checkpoint has it. The
    result has the loaded `others`. Raises `CheckpointError` when the checkpoint does not fit the model.
    """
    named = _with_names(model, optimizers)
    by_name = {name: parameter for _, names in named for parameter, name in names.items()}
    optimizer_state = _allocate(store.contents(info), by_name)
    wanted = {"model": _model_state(model), "optimizer": optimizer_state, **(others or {})}
    loaded = store.load(info, wanted)
    for optimizer, names in named:
        # load_state_dict numbers parameters in the order of the groups, and brings each entry to the device and type
        # on which the optimizer wants it.
        numbers = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
        state = {
            numbers[parameter]: loaded.state["optimizer"][name]
            for parameter, name in names.items()
            if name in optimizer_state
        }
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    rest = {key: value for key, value in loaded.state.items() if key in (others or {})}
    return LoadedState(state=rest, missing=loaded.missing)


def _model_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state, detached, by names without wrappers. A tensor with two names (tied) is there once."""
    bare = _bare(model)
    state = bare.state_dict()  # first: it makes FSDP2 present its shards
    first_names = {name for name, _ in bare.named_parameters()}
    second_names = {name for name, _ in bare.named_parameters(remove_duplicate=False)} - first_names
    return {_clean(name): tensor for name, tensor in state.items() if name not in second_names}


def _with_names(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[tuple[Optimizer, dict[nn.Parameter, str]]]:
    """Each optimizer with the names of the parameters that it steps."""
    names = {parameter: _clean(name) for name, parameter in _bare(model).named_parameters()}
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
    saved: Mapping[str, SavedTensor | None], parameters: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Any]]:
    """Room for the optimizer state of a checkpoint: sharded as its parameter is, where it has the parameter's shape."""
    state: dict[str, dict[str, Any]] = {}
    for key, entry in saved.items():
        name, _, part = key.removeprefix("optimizer.").rpartition(".")
        if not key.startswith("optimizer.") or name not in parameters:
            continue
        parameter = parameters[name].detach()
        if entry is None:
            value: Any = None
        elif entry.shape == parameter.shape:
            value = torch.zeros_like(parameter, dtype=entry.dtype)
        else:
            value = torch.zeros(entry.shape, dtype=entry.dtype)
        state.setdefault(name, {})[part] = value
    return state


def _bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _clean(name: str) -> str:
    return name.replace(_COMPILED, "")
