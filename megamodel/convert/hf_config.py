"""`config.json` of a Hugging Face checkpoint to ModelConfig and back. What this decoder does not compute is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megamodel.convert.families import (
    DEFAULT_ROPE_THETA,
    FAMILIES,
    HARMLESS_KEYS,
    LLAMA,
    MIXTRAL,
    QWEN3,
    QWEN3_MOE,
    RULED_KEYS,
    Family,
)
from megamodel.errors import ConversionError
from megamodel.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor on disk, and where it belongs: all of `ours`, or the transpose of its slice `expert`."""

    theirs: str
    ours: str
    shape: tuple[int, ...]
    expert: int | None


def dims(config: ModelConfig) -> dict[str, int]:
    """What the dims of a table's shapes stand for."""
    moe = config.moe
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "head_dim": config.head_dim,
        "q_width": config.num_heads * config.head_dim,
        "kv_width": config.num_kv_heads * config.head_dim,
        "d_ff": config.d_ff,
        "num_experts": moe.num_experts if moe else 0,
        "expert_d_ff": moe.d_ff if moe else 0,
    }


def tensor_specs(family: Family, config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor that a checkpoint of this shape has on disk, layer by layer."""
    size = dims(config)
    experts = range(size["num_experts"])
    layer_rows = [row for row in family.rows if "{layer}" in row.theirs]
    first_layer_row = family.rows.index(layer_rows[0])
    tail = [row for row in family.rows[first_layer_row:] if row not in layer_rows]

    def expand(row: Any, layer: int | None) -> Iterator[TensorSpec]:
        shape = tuple(size[dim] for dim in row.shape)
        for expert in experts if row.expert_of_stack else (None,):
            names = {"layer": layer, "expert": expert}
            yield TensorSpec(
                theirs=row.theirs.format(**names), ours=row.ours.format(**names), shape=shape, expert=expert
            )

    for row in family.rows[:first_layer_row]:
        yield from expand(row, None)
    for layer in range(config.num_layers):
        kind = "moe_layer" if config.is_moe_layer(layer) else "dense_layer"
        for row in layer_rows:
            if row.where in ("every_layer", kind):
                yield from expand(row, layer)
    for row in tail:
        if row.where == "model" or not config.tie_embeddings:
            yield from expand(row, None)


def family_for(config: ModelConfig) -> Family:
    """The family that computes what this decoder computes. Raises ConversionError naming every option that none has."""
    family = _nearest_family(config)
    problems = list(_inexpressible(config, family))
    if problems:
        raise ConversionError(f"no Hugging Face family known here expresses this model: {'; '.join(problems)}")
    return family


def export_problems(config: ModelConfig) -> list[str]:
    """Every option that keeps this decoder, once trained, from being expressed: known before it is trained."""
    family = _nearest_family(config)
    problems = list(_inexpressible(config, family))
    if config.moe is not None and config.moe.balance == "bias":
        problems.append("model.moe.balance = 'bias' (it changes which experts are chosen; only 'aux_loss' or 'none')")
    return problems


def _nearest_family(config: ModelConfig) -> Family:
    return {
        (False, False): LLAMA,
        (False, True): QWEN3,
        (True, True): QWEN3_MOE,
        (True, False): MIXTRAL,
    }[config.moe is not None, config.qk_norm]


def _inexpressible(config: ModelConfig, family: Family) -> Iterator[str]:
    if config.mla is not None:
        yield "model.mla (latent attention)"
    if family is LLAMA and config.d_model % config.num_heads:
        yield f"model.d_model = {config.d_model} with num_heads = {config.num_heads} (Llama needs a multiple)"
    moe = config.moe
    if moe is None:
        return
    if moe.router_score != "softmax":
        yield f"model.moe.router_score = {moe.router_score!r} (only 'softmax')"
    if moe.num_shared_experts:
        yield f"model.moe.num_shared_experts = {moe.num_shared_experts} (only 0)"
    if moe.gate_scale != 1:
        yield f"model.moe.gate_scale = {moe.gate_scale} (only 1)"
    if family is MIXTRAL and not moe.normalize_gates:
        yield "model.moe.normalize_gates = false without qk_norm (Mixtral normalises; Qwen3-MoE has qk_norm)"
    if family is MIXTRAL and config.num_moe_layers != config.num_layers:
        yield (
            f"model.moe.first_layer = {moe.first_layer}, every = {moe.every} without qk_norm "
            "(all layers of Mixtral hold experts; Qwen3-MoE has qk_norm)"
        )


def to_hf_config(config: ModelConfig, family: Family, dtype: str) -> dict[str, Any]:
    """The content of config.json. dtype: torch's name of the weights' number format, such as "float32"."""
    result: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type, "dtype": dtype}
    for key, field in family.fields.items():
        section, _, name = field.rpartition(".")
        result[key] = getattr(config.moe if section else config, name)
    result.update({key: allowed[0] for key, allowed in family.constants.items() if key != "partial_rotary_factor"})
    # The second is the spelling of transformers 5; older readers and other engines know the first.
    result["rope_theta"] = config.rope_theta
    result["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    result["use_cache"] = True
    moe = config.moe
    if moe is not None:
        result["router_aux_loss_coef"] = moe.aux_loss_weight if moe.balance == "aux_loss" else 0.0
    if family is QWEN3_MOE:
        result["decoder_sparse_step"] = 1
        result["mlp_only_layers"] = [layer for layer in range(config.num_layers) if not config.is_moe_layer(layer)]
    return result


def read_hf_config(folder: Path) -> tuple[Family, ModelConfig]:
    """Reads config.json of a checkpoint. Raises ConversionError naming the file and the key that is missing, malformed, or
    asks for something that this decoder does not compute."""
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint") from error
    except (OSError, ValueError) as error:
        raise ConversionError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConversionError(f"{file} holds a {type(raw).__name__}; it must hold an object")
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise ConversionError(f"{file}: model_type is {raw.get('model_type')!r}; supported are {', '.join(FAMILIES)}")
    raw = _rename_aliases(raw, family, file)
    problems = list(_unsupported(raw, family))
    if problems:
        raise ConversionError(f"{file} asks for what this decoder does not compute: {'; '.join(problems)}")
    return family, _model_config(raw, family, file)


def _rename_aliases(raw: Mapping[str, Any], family: Family, file: Path) -> dict[str, Any]:
    result = dict(raw)
    for alias, key in family.aliases.items():
        if alias in result:
            value = result.pop(alias)
            if result.setdefault(key, value) != value:
                raise ConversionError(f"{file}: {alias} is {value} and {key} is {result[key]}; they mean the same")
    return result


def _unsupported(raw: Mapping[str, Any], family: Family) -> Iterator[str]:
    architectures = raw.get("architectures")
    if architectures and architectures != [family.architecture]:
        yield f"architectures = {architectures} (only ['{family.architecture}'])"
    for key, allowed in family.constants.items():
        if key in raw and raw[key] not in allowed:
            yield f"{key} = {raw[key]!r} (only {allowed[0]!r})"
    if raw.get("rope_scaling"):
        yield f"rope_scaling = {raw['rope_scaling']!r} (only null)"
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        yield f"rope_parameters = {rope!r} (only rope_type 'default')"
    else:
        for key in sorted(set(rope) - {"rope_type", "rope_theta"}):
            if key != "partial_rotary_factor" or rope[key] != 1:
                yield f"rope_parameters.{key} = {rope[key]!r}"
        if "rope_theta" in raw and rope.get("rope_theta", raw["rope_theta"]) != raw["rope_theta"]:
            yield f"rope_parameters.rope_theta = {rope['rope_theta']} beside rope_theta = {raw['rope_theta']}"
    if any(kind != "full_attention" for kind in raw.get("layer_types") or ()):
        yield f"layer_types = {raw['layer_types']} (only 'full_attention')"
    if family is LLAMA and raw.get("sliding_window") is not None:
        yield f"sliding_window = {raw['sliding_window']!r} (only null)"
    known = {*family.fields, *family.constants, *HARMLESS_KEYS, *RULED_KEYS}
    for key in sorted(set(raw) - known):
        yield f"{key} = {raw[key]!r} (unknown key; take it out if it changes nothing about the forward pass)"


def _model_config(raw: Mapping[str, Any], family: Family, file: Path) -> ModelConfig:
    fields: dict[str, Any] = {}
    moe: dict[str, Any] = {}
    for key, name in family.fields.items():
        section, _, field = name.rpartition(".")
        (moe if section else fields)[field] = _value(raw, key, family, file)
    rope = raw.get("rope_parameters") or {}
    fields["rope_theta"] = rope.get("rope_theta") or raw.get("rope_theta") or DEFAULT_ROPE_THETA[family.model_type]
    fields["qk_norm"] = family in (QWEN3, QWEN3_MOE)
    if moe:
        # Mixtral's one hidden width is that of its experts; without dense layers the other has no meaning.
        fields.setdefault("d_ff", moe["d_ff"])
        moe["balance"] = "aux_loss" if moe["aux_loss_weight"] else "none"
        if family is QWEN3_MOE:
            moe.update(_layer_rule(raw, fields["num_layers"], file))
        fields["moe"] = moe
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        keys = {name.rpartition(".")[2]: key for key, name in family.fields.items()}
        found = [
            f"{keys.get(str(problem['loc'][-1]), problem['loc'][-1])}: {problem['msg']}"
            if problem["loc"]
            else problem["msg"]
            for problem in error.errors()
        ]
        raise ConversionError(f"{file} is not a valid shape: {'; '.join(found)}") from error


def _value(raw: Mapping[str, Any], key: str, family: Family, file: Path) -> Any:
    value = raw.get(key)
    if value is not None:
        return value
    if key not in family.defaults:
        raise ConversionError(f"{file} lacks {key}")
    default = family.defaults[key]
    if default == "$head_width":
        return _value(raw, "hidden_size", family, file) // _value(raw, "num_attention_heads", family, file)
    if isinstance(default, str):
        return _value(raw, default.removeprefix("$"), family, file)
    return default


def _layer_rule(raw: Mapping[str, Any], num_layers: int, file: Path) -> dict[str, int]:
    """`first_layer` and `every` for Qwen3-MoE's list of dense layers and step."""
    dense, step = raw.get("mlp_only_layers") or [], raw.get("decoder_sparse_step", 1)
    layers = [layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0]
    if not layers:
        raise ConversionError(f"{file}: mlp_only_layers and decoder_sparse_step leave no layer with experts")
    every = layers[1] - layers[0] if len(layers) > 1 else num_layers
    if layers != list(range(layers[0], num_layers, every)):
        raise ConversionError(
            f"{file}: mlp_only_layers = {dense} with decoder_sparse_step = {step} puts experts in layers {layers}; "
            "this decoder needs a first one and a constant step"
        )
    return {"first_layer": layers[0], "every": every}
