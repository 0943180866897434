"""From a configuration to a decoder on its device: meta, sharding plan, weights, compilation."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from megamodel.errors import TrainingError
from megamodel.model.config import ModelConfig
from megamodel.model.decoder import Decoder
from megamodel.model.initialization import initial_value
from megamodel.train.config import TrainConfig
from megamodel.train.sharding_plan import is_gathered_unit
from parallel.config import ParallelConfig
from parallel.data_parallel import DataParallel, wrap
from parallel.world import World

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """A decoder ready to train. `notice` is what the user should know of how it was built, if anything."""

    decoder: Decoder
    data_parallel: DataParallel
    notice: str | None


def compute_dtype(precision: str) -> torch.dtype:
    """The type of activations for `train.precision`."""
    return _DTYPES[precision]


def build_model(
    model: ModelConfig, train: TrainConfig, parallel: ParallelConfig, *, world: World, seed: int
) -> BuiltModel:
    """A decoder with initial weights that depend on the seed alone, spread over the ranks. A collective."""
    with torch.device("meta"):
        decoder = Decoder(model)
    decoder.compute_dtype = compute_dtype(train.precision)
    notice = _compile_blocks(decoder, train.compile, world.device)
    sharded = parallel.data_engine == "fsdp2" and world.data_mesh is not None
    if not sharded:
        materialize(decoder, world.device, model, seed)
    data_parallel = wrap(
        decoder,
        mesh=world.data_mesh,
        engine=parallel.data_engine,
        is_unit=is_gathered_unit,
        param_dtype=decoder.compute_dtype if sharded and train.precision != "fp32" else None,
        reduce_dtype=_DTYPES[parallel.reduce_dtype],
        reshard_after_forward=parallel.reshard_after_forward,
    )
    if sharded:
        materialize(decoder, world.device, model, seed)
    return BuiltModel(decoder=decoder, data_parallel=data_parallel, notice=notice)


@torch.no_grad()
def materialize(decoder: nn.Module, device: torch.device, config: ModelConfig, seed: int) -> None:
    """Gives a decoder on meta memory and initial weights; a sharded tensor gets its part of the same whole."""
    decoder.to_empty(device=device)
    for name, tensor in [*decoder.named_parameters(), *decoder.named_buffers()]:
        value = initial_value(name, tensor.shape, config, seed).to(device)
        if isinstance(tensor, DTensor):
            # Every rank has computed the same whole tensor, so nothing is sent (src_data_rank=None).
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(value)


def find_compiler(device_type: str) -> str | None:
    """What torch.compile would build kernels with on this kind of device, or None where that is missing."""
    if device_type == "cuda":
        try:
            import triton
        except ImportError:
            return None
        return f"triton {triton.__version__}"
    return next((found for name in (os.environ.get("CXX", "g++"), "clang++") if (found := shutil.which(name))), None)


def _compile_blocks(decoder: Decoder, choice: str, device: torch.device) -> str | None:
    """Compiles each block's forward in place: names stay, and blocks of a kind share one compilation."""
    if choice == "off":
        return None
    if find_compiler(device.type) is None:
        missing = "Triton" if device.type == "cuda" else "a C++ compiler (Debian: apt-get install g++)"
        if choice == "on":
            raise TrainingError(f'train.compile = "on" needs {missing}; install it, or set train.compile = "off"')
        return f"torch.compile is off: {missing} is missing; training is slower without"
    for block in decoder.layers:
        # The forward, not the module: FSDP2's hooks around it must stay outside the compiled region.
        block.forward = torch.compile(block.forward, dynamic=False)
    return None
