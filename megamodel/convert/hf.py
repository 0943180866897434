"""Decoders from and to Hugging Face checkpoints: Llama, Qwen3, Qwen3-MoE and Mixtral.

Shape suffixes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamodel.convert.families import DERIVED_TENSOR_SUFFIX, Family
from megamodel.convert.hf_config import TensorSpec, family_for, read_hf_config, tensor_specs, to_hf_config
from megamodel.convert.shards import PlannedTensor, ShardFolder, write_shards
from megamodel.errors import ConversionError
from megamodel.model.config import ModelConfig
from megamodel.model.decoder import Decoder

_READABLE = (torch.float32, torch.bfloat16, torch.float16)
_HEAD = "lm_head.weight"


def load_hf_model(path: str | Path) -> tuple[ModelConfig, Decoder]:
    """Reads a checkpoint folder into a decoder in fp32 on the CPU; `decoder(tokens_BS)` gives logits (B, S, V).

    Raises ConversionError, naming file and key or tensor, where config.json asks for what the decoder does not compute, or
    where any tensor is missing, unexpected, or of another shape or number format than the family's table says.
    """
    folder = Path(path)
    family, config = read_hf_config(folder)
    shards = ShardFolder.open(folder)
    specs = {spec.theirs: spec for spec in tensor_specs(family, config)}
    _check_names(specs, shards, config)
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu")
    state = model.state_dict()
    for name, tensor in shards.read(list(specs)):
        spec = specs[name]
        file = folder / shards.file_of[name]
        if tuple(tensor.shape) != spec.shape:
            raise ConversionError(
                f"{file}: {name} has shape {list(tensor.shape)}; config.json means {list(spec.shape)}"
            )
        if tensor.dtype not in _READABLE:
            raise ConversionError(f"{file}: {name} is {tensor.dtype}; only fp32, bf16 and fp16 weights are read")
        _slot(state, spec).copy_(tensor)
    _check_tied_head(specs, shards, state, config)
    return config, model


def save_hf_model(
    config: ModelConfig,
    model: Decoder,
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 5 * 10**9,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json, safetensors files and their index into the folder `path`, replacing weights that stand there.

    dtype: number format of the weights on disk. extra_config: further keys of config.json, such as token ids.
    Raises ConversionError naming the options that no family expresses, before anything is written.
    """
    family = family_for(config)
    state = model.state_dict()
    _check_balance_bias(state)
    planned = [_planned(spec, state, dtype) for spec in _checked_specs(family, config, state)]
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, planned, max_shard_bytes)
    content = {**to_hf_config(config, family, str(dtype).removeprefix("torch.")), **(extra_config or {})}
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _slot(state: Mapping[str, Tensor], spec: TensorSpec) -> Tensor:
    """Our tensor, or our slice of a stack as the disk has it: a view either way."""
    tensor = state[spec.ours]
    return tensor if spec.expert is None else tensor[spec.expert].t()


def _planned(spec: TensorSpec, state: Mapping[str, Tensor], dtype: torch.dtype) -> PlannedTensor:
    def make(source: Tensor) -> Tensor:
        # A copy, since a file may not hold two names for one memory, and a transposed view is not contiguous.
        return source.detach().to(device="cpu", dtype=dtype, copy=True, memory_format=torch.contiguous_format)

    slot = _slot(state, spec)
    return PlannedTensor(name=spec.theirs, num_bytes=slot.numel() * dtype.itemsize, make=partial(make, slot))


def _check_names(specs: Mapping[str, TensorSpec], shards: ShardFolder, config: ModelConfig) -> None:
    missing = [name for name in specs if name not in shards.file_of]
    if missing:
        raise ConversionError(
            f"{shards.folder} lacks {len(missing)} tensors that config.json means, first {missing[0]}"
        )
    unexpected = [
        name
        for name in sorted(set(shards.file_of) - set(specs))
        if not name.endswith(DERIVED_TENSOR_SUFFIX) and not (config.tie_embeddings and name == _HEAD)
    ]
    if unexpected:
        name = unexpected[0]
        raise ConversionError(
            f"{shards.folder / shards.file_of[name]} holds {len(unexpected)} tensors that config.json does not mean, "
            f"first {name}"
        )


def _check_tied_head(
    specs: Mapping[str, TensorSpec], shards: ShardFolder, state: Mapping[str, Tensor], config: ModelConfig
) -> None:
    """Some checkpoints hold the output matrix though it is tied; then it must be the embedding."""
    if _HEAD in specs or _HEAD not in shards.file_of:
        return
    ((_, head),) = shards.read([_HEAD])
    if not torch.equal(head.float(), state["embedding.weight"]):
        raise ConversionError(
            f"{shards.folder / shards.file_of[_HEAD]}: {_HEAD} differs from the embedding though config.json says "
            "tie_word_embeddings; set it to false if the output matrix is meant"
        )


def _checked_specs(family: Family, config: ModelConfig, state: Mapping[str, Tensor]) -> list[TensorSpec]:
    """The table against the model, both ways."""
    specs = list(tensor_specs(family, config))
    ours = {spec.ours for spec in specs}
    unknown = sorted(set(state) - ours - {name for name in state if name.endswith("balance_bias")})
    missing = sorted(ours - set(state))
    if unknown or missing:
        raise ConversionError(
            f"the model is not of the shape in its config: {family.model_type} has no place for {unknown[:3]} and "
            f"needs {missing[:3]}"
        )
    for spec in specs:
        if tuple(_slot(state, spec).shape) != spec.shape:
            raise ConversionError(
                f"the model is not of the shape in its config: {spec.ours} gives {list(_slot(state, spec).shape)} for "
                f"{spec.theirs}, which is {list(spec.shape)}"
            )
    return specs


def _check_balance_bias(state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if name.endswith("balance_bias") and bool(tensor.any()):
            raise ConversionError(
                f"no Hugging Face family known here expresses this model: {name} is not zero (model.moe.balance = 'bias' "
                "changes which experts are chosen); train with balance = 'aux_loss' to export"
            )
