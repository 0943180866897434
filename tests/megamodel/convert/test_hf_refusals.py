"""What cannot be expressed, read or trusted is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamodel.convert.hf import load_hf_model, save_hf_model
from megamodel.errors import ConversionError
from tests.megamodel.convert.conftest import write_checkpoint
from tests.megamodel.small import MLA, MOE, build, small_config

WEIGHTS = "model.safetensors"


def _edit_config(folder: Path, changes: dict[str, Any], drop: tuple[str, ...] = ()) -> None:
    file = folder / "config.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in drop}))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mla": MLA}, ["model.mla"]),
        ({"moe": {**MOE, "router_score": "sigmoid"}}, ["model.moe.router_score = 'sigmoid'"]),
        ({"moe": {**MOE, "num_shared_experts": 2}}, ["model.moe.num_shared_experts = 2"]),
        ({"moe": {**MOE, "gate_scale": 2.5}}, ["model.moe.gate_scale = 2.5"]),
        ({"moe": {**MOE, "normalize_gates": False}}, ["model.moe.normalize_gates = false without qk_norm"]),
        ({"moe": {**MOE, "first_layer": 1}}, ["model.moe.first_layer = 1, every = 1 without qk_norm"]),
        ({"d_model": 30}, ["model.d_model = 30 with num_heads = 4"]),
        (
            {"mla": MLA, "moe": {**MOE, "router_score": "sigmoid", "gate_scale": 2.0}},
            ["model.mla", "router_score", "gate_scale"],
        ),
    ],
)
def test_models_that_no_family_expresses(fields: dict[str, Any], named: list[str], tmp_path: Path) -> None:
    config = small_config(**fields)
    with pytest.raises(ConversionError) as caught:
        save_hf_model(config, build(config), tmp_path / "out")
    assert all(name in str(caught.value) for name in named)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out").exists()


def test_balance_bias_that_has_moved(tmp_path: Path) -> None:
    config = small_config(qk_norm=True, moe={**MOE, "balance": "bias"})
    decoder = build(config)
    save_hf_model(config, decoder, tmp_path / "still_zero")
    decoder.update_balance_bias(torch.tensor([[1, 1, 1, 1], [4, 0, 0, 0]]))
    with pytest.raises(ConversionError, match=r"layers.1.moe.router.balance_bias is not zero"):
        save_hf_model(config, decoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_config_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="not of the shape in its config"):
        save_hf_model(small_config(vocab_size=98), build(small_config()), tmp_path)
    with pytest.raises(ConversionError, match=r"has no place for .*lm_head.weight"):
        save_hf_model(small_config(tie_embeddings=True), build(small_config()), tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "gpt2"}, r"model_type is 'gpt2'; supported are llama, qwen3, qwen3_moe, mixtral"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling = "),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters = .*yarn"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5",
        ),
        ("llama", {"rope_theta": 7.0}, "rope_parameters.rope_theta = 10000.0 beside rope_theta = 7.0"),
        ("llama", {"attention_bias": True}, "attention_bias = True"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp = 2"),
        ("llama", {"sliding_window": 16}, "sliding_window = 16"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config = .*unknown key"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures = "),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16}, "use_sliding_window = True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types = "),
        ("mixtral", {"sliding_window": 16}, "sliding_window = 16"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        ("qwen3_moe", {"num_experts": 8}, "num_local_experts is 4 and num_experts is 8"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "leave no layer with experts"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, r"top_k \(9\) must not exceed num_experts \(4\)"),
        ("llama", {"num_key_value_heads": 3}, r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        ("llama", {"hidden_size": -32}, "hidden_size: Input should be greater than 0"),
    ],
)
def test_configs_that_ask_for_more(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_checkpoint(name, tmp_path)
    _edit_config(tmp_path, changes)
    with pytest.raises(ConversionError, match=message) as caught:
        load_hf_model(tmp_path)
    assert "config.json" in str(caught.value)


def test_experts_without_a_constant_step(tmp_path: Path) -> None:
    write_checkpoint("qwen3_moe_every_other", tmp_path)
    _edit_config(tmp_path, {"decoder_sparse_step": 1, "mlp_only_layers": [2]})
    with pytest.raises(ConversionError, match=r"mlp_only_layers = \[2\] .* puts experts in layers \[0, 1, 3\]"):
        load_hf_model(tmp_path)


def test_old_and_new_spelling_of_the_rotary_base(tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path)
    _edit_config(tmp_path, {"rope_theta": 123.0, "rope_scaling": None}, drop=("rope_parameters",))
    assert load_hf_model(tmp_path)[0].rope_theta == 123.0
    _edit_config(tmp_path, {}, drop=("rope_theta",))
    assert load_hf_model(tmp_path)[0].rope_theta == 10_000.0


def test_missing_key_and_derived_keys(tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path)
    _edit_config(tmp_path, {}, drop=("head_dim", "rms_norm_eps", "tie_word_embeddings", "torch_dtype"))
    config, _ = load_hf_model(tmp_path)
    assert (config.head_dim, config.norm_eps, config.tie_embeddings) == (8, 1e-6, False)
    _edit_config(tmp_path, {}, drop=("hidden_size",))
    with pytest.raises(ConversionError, match=r"config.json lacks hidden_size"):
        load_hf_model(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_config_that_is_no_object(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConversionError, match=r"config.json (is not readable JSON|holds a list)"):
        load_hf_model(tmp_path)


def test_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"has no config.json"):
        load_hf_model(tmp_path / "nowhere")
    write_checkpoint("llama", tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ConversionError, match=r"has neither model.safetensors.index.json nor model.safetensors"):
        load_hf_model(tmp_path)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_tensors_that_are_missing_or_unexpected(name: str, tmp_path: Path) -> None:
    write_checkpoint(name, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    lost = next(key for key in tensors if "down_proj" in key)
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, tmp_path / WEIGHTS)
    with pytest.raises(ConversionError, match=f"lacks 1 tensors that config.json means, first {lost}"):
        load_hf_model(tmp_path)
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, tmp_path / WEIGHTS)
    with pytest.raises(ConversionError, match=r"model.safetensors holds 1 tensors .*first .*q_proj.bias"):
        load_hf_model(tmp_path)
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, tmp_path / WEIGHTS)
    load_hf_model(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(32, 41), r"has shape \[32, 41\]; config.json means \[32, 40\]"),
        (torch.zeros(40, 32), r"has shape \[40, 32\]; config.json means \[32, 40\]"),
        (torch.zeros(32, 40, dtype=torch.int8), r"is torch.int8; only fp32, bf16 and fp16"),
        (torch.zeros(32, 40, dtype=torch.float64), r"is torch.float64"),
    ],
)
def test_tensors_of_another_shape_or_format(tensor: torch.Tensor, message: str, tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path)
    key = "model.layers.1.mlp.down_proj.weight"
    save_file({**load_file(tmp_path / WEIGHTS), key: tensor}, tmp_path / WEIGHTS)
    with pytest.raises(ConversionError, match=message) as caught:
        load_hf_model(tmp_path)
    assert f"{tmp_path / WEIGHTS}: {key}" in str(caught.value)


def test_damaged_file(tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(ConversionError, match=r"model.safetensors is damaged or no safetensors file"):
        load_hf_model(tmp_path)


def test_index_and_files_that_disagree(tmp_path: Path) -> None:
    config = small_config()
    save_hf_model(config, build(config), tmp_path, max_shard_bytes=10_000)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    first = "model.layers.0.input_layernorm.weight"  # shares its file with others

    def rejects(weight_map: dict[str, str], message: str) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ConversionError, match=message):
            load_hf_model(tmp_path)

    moved = {**content["weight_map"], first: next(file for file in files if file != content["weight_map"][first])}
    rejects(moved, r"lacks tensor .*which model.safetensors.index.json says it holds")
    unlisted = {key: file for key, file in content["weight_map"].items() if key != first}
    rejects(unlisted, f"holds tensor {first}, which model.safetensors.index.json does not list there")
    rejects({**content["weight_map"], first: "../other.safetensors"}, "must lie in the same folder")
    rejects({**content["weight_map"], first: "gone.safetensors"}, r"names gone.safetensors, which is not there")
    index.write_text("{}")
    with pytest.raises(ConversionError, match="is not an index of weight files"):
        load_hf_model(tmp_path)


def test_writing_that_was_cut_short_leaves_nothing_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config()
    decoder = build(config)
    save_hf_model(config, decoder, tmp_path)
    import megamodel.convert.shards as shards

    calls: list[Path] = []

    def fail_at_second(tensors: Any, file: Path, **options: Any) -> None:
        calls.append(file)
        if len(calls) == 2:
            raise OSError("no space left on device")
        save_file(tensors, file, **options)

    monkeypatch.setattr(shards, "save_file", fail_at_second)
    with pytest.raises(OSError, match="no space"):
        save_hf_model(config, decoder, tmp_path, max_shard_bytes=10_000)
    with pytest.raises(ConversionError, match="has neither"):
        load_hf_model(tmp_path)
