"""From a configuration to a decoder on its device: meta, sharding plan, weights, compilation."""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from megamodel.errors import TrainingError
from megamodel.model.config import ModelConfig
from megamodel.model.decoder import Decoder, Seams
from megamodel.model.explicit_attention import ExplicitScores
from megamodel.model.initialization import initial_value
from megamodel.model.loss import ChunkedTokenLoss, chunk_terms
from megamodel.model.seams import ScaledDotProduct
from megamodel.train.config import TrainConfig
from megamodel.train.sharding_plan import is_full_precision, is_gathered_unit
from parallel.config import ParallelConfig
from parallel.data_parallel import DataParallel, wrap
from parallel.world import World

_EXPLICIT_UP_TO = 256
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """A decoder ready to train. `notice` is what the user should know of how it was built, if anything."""

    decoder: Decoder
    data_parallel: DataParallel
    compiled: bool
    notice: str | None


def compute_dtype(precision: str) -> torch.dtype:
    """The type of activations for `train.precision`."""
    return _DTYPES[precision]


def build_model(
    model: ModelConfig, train: TrainConfig, parallel: ParallelConfig, *, world: World, seed: int | None, seq_len: int
) -> BuiltModel:
    """A decoder with initial weights that depend on the seed alone, spread over the ranks. A collective.

    Without a seed the weights are left undefined: a checkpoint fills them. `seq_len`, the length of training rows in
    tokens, has a say in how attention is computed.
    """
    notice = _missing_compiler(train.compile, world.device)
    compiled = train.compile != "off" and notice is None
    with torch.device("meta"):
        decoder = Decoder(model, _seams(train, seq_len, device=world.device, compiled=compiled))
    decoder.compute_dtype = compute_dtype(train.precision)
    if compiled:
        compile_blocks(decoder)
    sharded = parallel.data_engine == "fsdp2" and world.data_mesh is not None
    if not sharded:
        materialize(decoder, world.device, model, seed)
    data_parallel = wrap(
        decoder,
        mesh=world.data_mesh,
        engine=parallel.data_engine,
        is_unit=is_gathered_unit,
        is_full_precision=is_full_precision,
        param_dtype=decoder.compute_dtype if sharded and train.precision != "fp32" else None,
        reduce_dtype=_DTYPES[parallel.reduce_dtype],
        reshard_after_forward=parallel.reshard_after_forward,
    )
    if sharded:
        materialize(decoder, world.device, model, seed)
    return BuiltModel(decoder=decoder, data_parallel=data_parallel, compiled=compiled, notice=notice)


@torch.no_grad()
def materialize(decoder: nn.Module, device: torch.device, config: ModelConfig, seed: int | None) -> None:
    """Gives a decoder on meta memory, and with a seed initial weights: a sharded tensor its part of the same whole."""
    decoder.to_empty(device=device)
    if seed is None:
        return
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
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return None
    return next((found for name in (os.environ.get("CXX", "g++"), "clang++") if (found := shutil.which(name))), None)


def compile_blocks(decoder: Decoder) -> None:
    """Compiles each block's forward in place: names stay, and blocks of a kind share one compilation."""
    for block in decoder.layers.values():
        # The forward, not the module: FSDP2's hooks around it must stay outside the compiled region.
        block.forward = torch.compile(block.forward, dynamic=False)


def _missing_compiler(choice: str, device: torch.device) -> str | None:
    """What to tell the user when compilation is wanted and cannot be had. Raises `TrainingError` when it must be."""
    if choice == "off" or find_compiler(device.type) is not None:
        return None
    missing = (
        "Triton" if device.type == "cuda" else "a C++ compiler with Python.h (Debian: apt-get install g++ python3-dev)"
    )
    if choice == "on":
        raise TrainingError(f'train.compile = "on" needs {missing}; install it, or set train.compile = "off"')
    return f"torch.compile is off: {missing} is missing; training is slower without"


def _seams(train: TrainConfig, seq_len: int, *, device: torch.device, compiled: bool) -> Seams:
    """The attention core and token loss that are fastest here; all compute the same."""
    explicit = train.attention == "explicit" or (
        # Measured by benchmarks/attention.py: compiled, on CPUs, explicit scores win for short rows.
        train.attention == "auto" and compiled and device.type == "cpu" and seq_len <= _EXPLICIT_UP_TO
    )
    terms = torch.compile(chunk_terms, dynamic=False) if compiled else chunk_terms
    return Seams(
        attention_core=ExplicitScores() if explicit else ScaledDotProduct(), token_loss=ChunkedTokenLoss(terms=terms)
    )
