"""Shape of the decoder: layer rule, presets, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from megamodel.model.config import ModelConfig
from megamodel.model.presets import PRESETS
from tests.megamodel.small import MLA, MOE, build, small_config


@pytest.mark.parametrize(
    ("rule", "layers"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"first_layer": 2}, [2, 3, 4, 5]),
        ({"every": 2}, [0, 2, 4]),
        ({"first_layer": 1, "every": 2}, [1, 3, 5]),
        ({"first_layer": 5, "every": 3}, [5]),
    ],
)
def test_layer_rule(rule: dict[str, int], layers: list[int]) -> None:
    config = small_config(num_layers=6, moe={**MOE, **rule})
    assert [layer for layer in range(6) if config.is_moe_layer(layer)] == layers
    assert config.num_moe_layers == len(layers)
    decoder = build(config)
    assert [layer for layer, block in enumerate(decoder.layers.values()) if block.moe is not None] == layers
    assert all((block.moe is None) != (block.mlp is None) for block in decoder.layers.values())


def test_no_moe_means_no_moe_layer() -> None:
    assert small_config().num_moe_layers == 0


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_keep_their_name(name: str) -> None:
    config = ModelConfig(preset=name)
    assert config.preset == name
    # A resolved config, preset and all fields, must mean the same model.
    assert ModelConfig(**config.model_dump()) == config


def test_fields_given_beside_a_preset_win() -> None:
    config = ModelConfig(preset="moe-tiny", vocab_size=1000, moe={"top_k": 1})
    assert config.vocab_size == 1000
    assert config.moe is not None
    assert config.moe.top_k == 1
    assert config.moe.num_experts == PRESETS["moe-tiny"]["moe"]["num_experts"]
    assert ModelConfig(preset="moe-tiny", moe=None).moe is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 3}, r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        ({"head_dim": 7}, "rotary positions need an even head width, not 7"),
        ({"mla": {**MLA, "qk_rope_head_dim": 3}}, "rotary positions need an even head width, not 3"),
        ({"moe": {**MOE, "top_k": 5}}, r"top_k \(5\) must not exceed num_experts \(4\)"),
        ({"moe": {**MOE, "first_layer": 2}}, r"moe.first_layer \(2\) must be below num_layers \(2\)"),
        ({"moe": {**MOE, "d_ff": 20}}, r"moe.d_ff \(20\) must be multiples of 8"),
        ({"moe": MOE, "d_model": 36}, r"d_model \(36\) .* must be multiples of 8"),
        ({"preset": "llama3-8bb"}, "unknown preset 'llama3-8bb'; there are moe-tiny"),
        ({"heads": 4}, "Extra inputs are not permitted"),
        ({"num_layers": 0}, "greater than 0"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        small_config(**fields)


def test_every_field_is_explained() -> None:
    for section in (ModelConfig, *(ModelConfig.model_fields[name].annotation.__args__[0] for name in ("moe", "mla"))):
        assert all(field.description for field in section.model_fields.values())


def test_configs_import_without_torch() -> None:
    modules = "megamodel.model.config, megamodel.generate.config, megamodel.convert.config"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
