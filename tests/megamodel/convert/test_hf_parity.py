"""Against transformers: what it wrote is read and computes the same, and is written back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megamodel.convert.hf import load_hf_model, save_hf_model
from megamodel.convert.transformers_adapter import reload_logits
from tests.megamodel.convert.conftest import CHECKPOINTS, write_checkpoint
from tests.megamodel.small import random_tokens


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every file."""
    result: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            assert name not in result
            result[name] = tensor
    return result


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_and_round_trip(name: str, tmp_path: Path) -> None:
    theirs = write_checkpoint(name, tmp_path / "theirs")
    config, decoder = load_hf_model(tmp_path / "theirs")
    tokens = random_tokens(config, 2, 40)
    with torch.no_grad():
        expected, found = theirs(input_ids=tokens).logits, decoder(tokens)
    assert expected.std() > 0.5  # logits near zero would agree by themselves
    assert float((found - expected).abs().max()) <= 1e-4
    assert all(parameter.dtype == torch.float32 for parameter in decoder.parameters())

    save_hf_model(config, decoder, tmp_path / "ours", max_shard_bytes=30_000)
    before, after = all_tensors(tmp_path / "theirs"), all_tensors(tmp_path / "ours")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
    assert float((reload_logits(tmp_path / "ours", tokens) - expected).abs().max()) <= 1e-4
    assert load_hf_model(tmp_path / "ours")[0] == config


@pytest.mark.parametrize("name", ["llama", "qwen3_moe_some_dense"])
def test_gradients_agree(name: str, tmp_path: Path) -> None:
    theirs = write_checkpoint(name, tmp_path)
    config, decoder = load_hf_model(tmp_path)
    tokens = random_tokens(config, 2, 20)
    weight = torch.randn(2, 20, config.vocab_size)
    (theirs(input_ids=tokens).logits * weight).sum().backward()
    (decoder(tokens) * weight).sum().backward()
    torch.testing.assert_close(
        decoder.embedding.weight.grad, theirs.model.embed_tokens.weight.grad, rtol=1e-3, atol=1e-3
    )


def test_one_tensor_an_expert_with_published_names(tmp_path: Path) -> None:
    write_checkpoint("mixtral", tmp_path / "mixtral")
    write_checkpoint("qwen3_moe", tmp_path / "qwen3_moe")
    for name, experts, one in (
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight", (32, 40)),
        ("qwen3_moe", "model.layers.1.mlp.experts.3.down_proj.weight", (32, 16)),
    ):
        config, decoder = load_hf_model(tmp_path / name)
        save_hf_model(config, decoder, tmp_path / f"{name}_ours")
        assert all_tensors(tmp_path / f"{name}_ours")[experts].shape == one
    written = json.loads((tmp_path / "qwen3_moe_ours" / "config.json").read_text())
    assert written["architectures"] == ["Qwen3MoeForCausalLM"]
    assert written["num_experts"] == 4  # the published key, not transformers 5's new one


def test_index_even_for_one_file(tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path / "theirs")
    config, decoder = load_hf_model(tmp_path / "theirs")
    save_hf_model(config, decoder, tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    tensors = all_tensors(tmp_path / "ours")
    assert set(index["weight_map"]) == set(tensors)
    assert set(index["weight_map"].values()) == {"model-00001-of-00001.safetensors"}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_shards_stay_below_their_limit(tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path / "theirs")
    config, decoder = load_hf_model(tmp_path / "theirs")
    save_hf_model(config, decoder, tmp_path / "ours", max_shard_bytes=12_000)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 12_000
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())["weight_map"]
    for file in files:
        assert set(load_file(file)) == {key for key, where in index.items() if where == file.name}


def test_bf16_weights(tmp_path: Path) -> None:
    write_checkpoint("qwen3", tmp_path / "theirs")
    config, decoder = load_hf_model(tmp_path / "theirs")
    save_hf_model(config, decoder, tmp_path / "ours", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in all_tensors(tmp_path / "ours").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"
    _, again = load_hf_model(tmp_path / "ours")
    for key, tensor in decoder.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor.bfloat16().float()), key


def test_tied_head_that_is_written_twice(tmp_path: Path) -> None:
    """Published Qwen3 checkpoints with tied embeddings hold the output matrix all the same."""
    from safetensors.torch import save_file

    from megamodel.errors import ConversionError

    write_checkpoint("qwen3_tied", tmp_path)
    tensors = all_tensors(tmp_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    config, _ = load_hf_model(tmp_path)
    assert config.tie_embeddings
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"lm_head.weight differs from the embedding"):
        load_hf_model(tmp_path)


def test_older_weights_in_the_folder_are_replaced(tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path)
    config, decoder = load_hf_model(tmp_path)
    with torch.no_grad():
        decoder.embedding.weight += 1
    save_hf_model(config, decoder, tmp_path, max_shard_bytes=12_000)
    save_hf_model(config, decoder, tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]
    assert torch.equal(load_hf_model(tmp_path)[1].embedding.weight, decoder.embedding.weight)
