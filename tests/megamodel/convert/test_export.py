"""An export counts only once transformers has loaded it and computes the same."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import megamodel.convert.export as export_module
import megamodel.convert.hf as hf_module
from megamodel.convert.config import ExportConfig
from megamodel.convert.export import ExportResult, export_hf
from megamodel.convert.hf import load_hf_model
from megamodel.convert.hf_config import TensorSpec
from megamodel.convert.origin import read_origin
from megamodel.errors import ConversionError, ParityError
from megamodel.generate.config import GenerateConfig
from megamodel.generate.text import generate_text
from tests.megamodel.small import MLA, MOE, build, small_config
from tests.megamodel.tokenizers_for_tests import write_small_tokenizer
from tests.requirements import requires

needs_transformers = requires("transformers")
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"tie_embeddings": True},
    "qwen3": {"qk_norm": True},
    "qwen3_moe": {"qk_norm": True, "moe": {**MOE, "first_layer": 1}, "tie_embeddings": True},
    "mixtral": {"moe": MOE},
}
RECORD = {"steps": 400, "val_loss": 2.718281828, "throughput": {"tokens_per_s": 7300.5}, "note": "a|b"}
EXPECTED_FILES = [
    "README.md",
    "config.json",
    "generation_config.json",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.fixture
def tokenizer_path(tmp_path: Path) -> Path:
    return write_small_tokenizer(tmp_path / "tokenizer.json")


def _export(tmp_path: Path, shape: str = "qwen3_moe", seed: int = 0, **options: Any) -> ExportResult:
    config = small_config(vocab_size=320, **SHAPES[shape])
    options = {"tokenizer_path": tmp_path / "tokenizer.json", "record": RECORD, **options}
    return export_hf(config, build(config, seed), tmp_path / "export" / "hf", **options)


def _left(tmp_path: Path) -> list[str]:
    folder = tmp_path / "export"
    return sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []


@needs_transformers
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_export(shape: str, dtype: Any, tmp_path: Path, tokenizer_path: Path) -> None:
    result = _export(tmp_path, shape, options=ExportConfig(dtype=dtype))
    assert result.family == shape
    assert result.max_logit_difference <= 1e-4
    assert result.files == EXPECTED_FILES == sorted(file.name for file in result.path.iterdir())
    assert _left(tmp_path) == ["hf"]
    config, _ = load_hf_model(result.path)
    assert config.num_moe_layers == small_config(**SHAPES[shape]).num_moe_layers


@needs_transformers
def test_transformers_continues_text_as_we_do(tmp_path: Path, tokenizer_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = _export(tmp_path).path
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    inputs = tokenizer("def add(", return_tensors="pt")
    start = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert inputs["input_ids"][0, 0] == start
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == model.config.eos_token_id == start
    new_ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]

    _, ours = load_hf_model(path)
    config = GenerateConfig(prompts=["def add("], max_new_tokens=12, temperature=0)
    (done,) = generate_text(ours, config, tokenizer_path=path)
    assert done.text == tokenizer.decode(new_ids, skip_special_tokens=True)
    assert tokenizer.decode(tokenizer("naïve – 零 🙂").input_ids, skip_special_tokens=True) == "naïve – 零 🙂"


@needs_transformers
def test_template_of_another_tokenizer_is_replaced(tmp_path: Path, tokenizer_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    tokenizer.post_processor = TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tokenizer_path))
    written = Tokenizer.from_file(str(_export(tmp_path).path / "tokenizer.json"))
    ids = written.encode("import os\n" * 4).ids
    assert ids[0] == 0
    assert 0 not in ids[1:]
    assert written.decode(ids) == "import os\n" * 4


@needs_transformers
def test_model_card_gives_the_figures_of_the_record(tmp_path: Path, tokenizer_path: Path) -> None:
    result = _export(tmp_path, title="A small one")
    card = (result.path / "README.md").read_text()
    for line in (
        "# A small one",
        "| steps | 400 |",
        "| val_loss | 2.718281828 |",
        "| throughput.tokens_per_s | 7300.5 |",
        r"| note | a\|b |",
        "| moe.num_experts | 4 |",
        f"{result.num_parameters:,} parameters",
        f"{result.max_logit_difference:.2e}",
    ):
        assert line in card
    assert card.startswith("---\nlibrary_name: transformers\n")


@needs_transformers
def test_an_export_says_where_it_comes_from(tmp_path: Path, tokenizer_path: Path) -> None:
    path = _export(tmp_path, origin={"step": 4}).path
    assert read_origin(path) == {"step": 4}
    (path / "config.json").unlink()  # not a whole export
    assert read_origin(path) is None
    assert read_origin(tmp_path) is None


@needs_transformers
def test_all_is_on_the_disk_before_the_folder_gets_its_name(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, target = tmp_path / "export" / "hf.partial", tmp_path / "export" / "hf"
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def watched_rename(self: Path, to: Path) -> Path:
        done.append(f"{self} becomes {to}")
        return rename(self, to)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    _export(tmp_path)
    named = done.index(f"{folder} becomes {target}")
    assert {str(folder), *(str(folder / name) for name in EXPECTED_FILES)} <= set(done[:named])
    assert str(target.parent) in done[named:]
    # The weights are there before the index that names them.
    assert done.index(str(folder / "model-00001-of-00001.safetensors")) < done.index(
        str(folder / "model.safetensors.index.json.partial")
    )


@needs_transformers
def test_an_older_export_is_replaced(tmp_path: Path, tokenizer_path: Path) -> None:
    _export(tmp_path, "llama", seed=0)
    (tmp_path / "export" / "hf" / "stale.txt").write_text("old")
    result = _export(tmp_path, "qwen3_moe", seed=1)
    assert result.files == EXPECTED_FILES
    assert load_hf_model(result.path)[0].moe is not None
    assert _left(tmp_path) == ["hf"]


@needs_transformers
@pytest.mark.parametrize("earlier", [False, True])
def test_logits_that_differ(
    earlier: bool, tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gate and up projections swapped on the way out: every shape is right, and the model is another."""
    if earlier:
        _export(tmp_path)
    specs = hf_module.tensor_specs

    def swapped(*args: Any) -> list[TensorSpec]:
        names = {"w_gate_EDF": "w_up_EDF", "w_up_EDF": "w_gate_EDF"}
        result = []
        for spec in specs(*args):
            stem, _, last = spec.ours.rpartition(".")
            changed = f"{stem}.{names[last]}" if last in names else spec.ours
            result.append(TensorSpec(theirs=spec.theirs, ours=changed, shape=spec.shape, expert=spec.expert))
        return result

    monkeypatch.setattr(hf_module, "tensor_specs", swapped)
    with pytest.raises(
        ParityError, match=r"gives logits that differ by .* \(allowed 1e-04\); it was not kept"
    ) as caught:
        _export(tmp_path, seed=1)
    assert caught.value.exit_code == 3
    monkeypatch.undo()
    assert _left(tmp_path) == (["hf"] if earlier else [])
    if earlier:
        kept = load_hf_model(tmp_path / "export" / "hf")[1]
        assert torch.equal(
            kept.embedding.weight, build(small_config(vocab_size=320, **SHAPES["qwen3_moe"])).embedding.weight
        )


@needs_transformers
def test_logits_that_are_not_numbers(tmp_path: Path, tokenizer_path: Path) -> None:
    config = small_config(vocab_size=320)
    decoder = build(config)
    with torch.no_grad():
        decoder.final_norm.weight[0] = float("nan")
    with pytest.raises(ParityError, match="differ by nan"):
        export_hf(config, decoder, tmp_path / "export" / "hf", tokenizer_path=tokenizer_path, record={})
    assert _left(tmp_path) == []


@needs_transformers
def test_weights_that_transformers_misses(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = export_module.save_hf_model

    def lose_one(config: Any, model: Any, path: Path, **options: Any) -> None:
        save(config, model, path, **options)
        from safetensors.torch import load_file, save_file

        file = path / "model-00001-of-00001.safetensors"
        tensors = load_file(file)
        del tensors["model.norm.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
        index = path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        del content["weight_map"]["model.norm.weight"]
        index.write_text(json.dumps(content))

    monkeypatch.setattr(export_module, "save_hf_model", lose_one)
    with pytest.raises(ParityError, match=r"reports missing_keys .*model.norm.weight"):
        _export(tmp_path)
    assert _left(tmp_path) == []


@needs_transformers
def test_tokenizer_that_transformers_reads_differently(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "reload_token_ids", lambda folder, text: [0, 1, 2])
    with pytest.raises(ParityError, match=r"the tokenizer, reloaded with transformers, gives ids \[0, 1, 2\]"):
        _export(tmp_path)
    assert _left(tmp_path) == []


@needs_transformers
def test_checkpoint_that_transformers_cannot_load(tmp_path: Path) -> None:
    from megamodel.convert.transformers_adapter import reload_logits, reload_token_ids

    with pytest.raises(ParityError, match="transformers cannot load the export in"):
        reload_logits(tmp_path, torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ParityError, match="transformers cannot load the tokenizer in"):
        reload_token_ids(tmp_path, "a")


def test_without_transformers(tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConversionError, match=r"transformers, which is not installed; .* pip install 'mega\[hf\]'"):
        _export(tmp_path)
    assert _left(tmp_path) == []


@needs_transformers
@pytest.mark.parametrize("kind", ["missing", "damaged", "other", "large"])
def test_tokenizers_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    message = {
        "missing": "there is no tokenizer at",
        "damaged": "is not a tokenizer that the tokenizers library reads",
        "other": r"has no token '<\|endoftext\|>'",
        "large": "has 330 tokens and the model's vocab_size is 320",
    }[kind]
    if kind == "damaged":
        path.write_text("{")
    elif kind == "other":
        write_small_tokenizer(path, end_of_text="</s>")
    elif kind == "large":
        tokenizer = Tokenizer.from_file(str(write_small_tokenizer(path)))
        tokenizer.add_tokens([f"<extra {number}>" for number in range(330 - tokenizer.get_vocab_size())])
        tokenizer.save(str(path))
    with pytest.raises(ConversionError, match=message):
        _export(tmp_path)
    assert _left(tmp_path) == []


@needs_transformers
def test_targets_refused(tmp_path: Path, tokenizer_path: Path) -> None:
    target = tmp_path / "export" / "hf"
    target.mkdir(parents=True)
    _export(tmp_path)  # an empty folder is taken
    (target / "config.json").unlink()
    with pytest.raises(ConversionError, match="holds other files and no earlier export"):
        _export(tmp_path)
    assert (target / "README.md").exists()
    config = small_config(vocab_size=320)
    with pytest.raises(ConversionError, match="is a file; name a folder"):
        export_hf(config, build(config), tokenizer_path, tokenizer_path=tokenizer_path, record={})


@needs_transformers
def test_model_refused_before_anything_is_written(tmp_path: Path, tokenizer_path: Path) -> None:
    config = small_config(vocab_size=320, mla=MLA)
    with pytest.raises(ConversionError, match=r"model\.mla"):
        export_hf(config, build(config), tmp_path / "export" / "hf", tokenizer_path=tokenizer_path, record={})
    assert _left(tmp_path) == []


@needs_transformers
def test_what_a_killed_export_left_is_swept_away(tmp_path: Path, tokenizer_path: Path) -> None:
    for name in ("hf.partial", "hf.replaced"):
        (tmp_path / "export" / name).mkdir(parents=True)
        (tmp_path / "export" / name / "half").write_text("x")
    _export(tmp_path)
    assert _left(tmp_path) == ["hf"]


@needs_transformers
def test_killed_while_replacing_and_then_refused(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _export(tmp_path)
    (tmp_path / "export" / "hf").rename(tmp_path / "export" / "hf.replaced")
    monkeypatch.setattr(export_module, "reload_token_ids", lambda folder, text: [])
    with pytest.raises(ParityError):
        _export(tmp_path)
    assert _left(tmp_path) == ["hf"]
    load_hf_model(tmp_path / "export" / "hf")


@needs_transformers
def test_bf16_compute_of_the_trained_model_does_not_matter(tmp_path: Path, tokenizer_path: Path) -> None:
    config = small_config(vocab_size=320, **SHAPES["qwen3_moe"])
    decoder = build(config)
    decoder.compute_dtype = torch.bfloat16
    result = export_hf(config, decoder, tmp_path / "export" / "hf", tokenizer_path=tokenizer_path, record={})
    assert result.max_logit_difference <= 1e-4
    assert "The run left no record." in (result.path / "README.md").read_text()


@pytest.mark.parametrize("fields", [{"format": "gguf"}, {"dtype": "fp8"}, {"max_shard_bytes": 0}])
def test_config_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ExportConfig(**fields)
