"""The configuration of runs: sections composed, checks between them, and files made from them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.config import RunConfig, load_run_config, resolved_toml
from launcher.config_tree import sections
from launcher.errors import ConfigError
from launcher.starter import STARTING_POINT, starter_toml
from megamodel.model.presets import PRESETS

SMALL = ("model.preset=moe-tiny", "data.tokenizer.vocab_size=512", "data.seq_len=128")


def problems(*overrides: str, num_ranks: int | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_run_config((), (*SMALL, *overrides), num_ranks=num_ranks)
    return caught.value.problems


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resolved_configuration_repeats_the_run_from_its_file_alone(preset: str, tmp_path: Path) -> None:
    overrides = [f"model.preset={preset}", "data.tokenizer.vocab_size=300", "data.seq_len=64", "export.format=none"]
    loaded = load_run_config((), overrides)
    file = tmp_path / "config.toml"
    file.write_text(resolved_toml(loaded.config, loaded.origins))
    assert load_run_config([file]).config == loaded.config


def test_every_key_has_a_docstring() -> None:
    undocumented = [setting.key for section in sections(RunConfig) for setting in section.settings if not setting.doc]
    assert undocumented == []


def test_the_starter_file_is_what_it_says(tmp_path: Path) -> None:
    loaded = load_run_config((), STARTING_POINT)
    text = starter_toml(loaded.config, loaded.origins.keys())
    file = tmp_path / "starter.toml"
    file.write_text(text)
    again = load_run_config([file])
    assert again.config == loaded.config
    assert {key for key in again.origins if key.count(".") > 0} >= {"model.preset", "train.steps"}
    assert "#global_batch_size = 32" in text
    # With every commented key made a real one it still means the same.
    file.write_text(re.sub(r"^#(?=\w+ = |\[model\.moe\])", "", text, flags=re.MULTILINE))
    assert "\nglobal_batch_size = 32" in file.read_text()
    assert load_run_config([file]).config == loaded.config


def test_the_batch_must_divide_among_the_ranks() -> None:
    assert problems("train.global_batch_size=10", num_ranks=4) == (
        "--set train.global_batch_size=10: train.global_batch_size = 10: cannot be shared by 4 data ranks evenly; "
        "use train.global_batch_size = 8 or 12, or --ranks 2 or 5",
    )
    (found,) = problems("train.global_batch_size=12", "train.micro_batch_size=3", num_ranks=3)
    assert "cannot be shared by 3 data ranks of 3 samples (train.micro_batch_size) evenly; use " in found
    load_run_config((), (*SMALL, "train.global_batch_size=12", "train.micro_batch_size=3"), num_ranks=2)
    # Ranks that share samples count once.
    load_run_config((), (*SMALL, "train.global_batch_size=2", "parallel.tp=2"), num_ranks=4)


def test_every_reason_against_a_layout_is_told_at_its_source() -> None:
    found = problems("parallel.tp=3", num_ranks=8)
    assert len(found) == 5
    assert all(problem.endswith("use parallel.tp = 2 or 4") for problem in found)
    assert found[1] == (
        "--set parallel.tp=3: parallel.tp = 3: must divide model.num_heads = 4; use parallel.tp = 2 or 4"
    )
    assert found[-1].startswith("--set data.seq_len=128: data.seq_len = 128: must be a multiple of parallel.cp * ")


def test_a_layout_of_a_bad_degree_is_told_once() -> None:
    assert problems("parallel.tp=0", num_ranks=8) == (
        "--set parallel.tp=0: parallel.tp = 0: must be greater than or equal to 1",
    )
    (found,) = problems("parallel.dp_shard=0", num_ranks=8)
    assert found.endswith("must be at least 1, or -1 for all ranks that the other axes leave")


def test_who_only_reads_a_configuration_needs_no_ranks_for_its_layout() -> None:
    parallel = load_run_config((), (*SMALL, "parallel.tp=2", "parallel.ep=4", "parallel.pp=2")).config.parallel
    assert (parallel.tp, parallel.ep) == (2, 4)


def test_rows_must_fit_the_model() -> None:
    assert problems("data.seq_len=129") == (
        "--set data.seq_len=129: data.seq_len = 129: longer than model.max_seq_len = 128; lower it, or raise that",
    )


def test_the_vocabulary_must_fit_the_model() -> None:
    assert problems("data.tokenizer.vocab_size=513") == (
        "--set data.tokenizer.vocab_size=513: data.tokenizer.vocab_size = 513: more than model.vocab_size = 512 rows of "
        "the embedding; lower it, or raise that",
    )
    # A given tokenizer brings its own size.
    load_run_config((), (*SMALL, "data.tokenizer.vocab_size=513", "data.tokenizer.path=/x"))


def test_a_model_that_cannot_be_exported_is_told_before_it_is_trained() -> None:
    (found,) = problems("model.moe.balance=bias", "model.moe.router_score=sigmoid")
    assert found == (
        "defaults: export.format = \"hf\": no Hugging Face family known here expresses model.moe.router_score = 'sigmoid' "
        "(only 'softmax'); model.moe.balance = 'bias' (it changes which experts are chosen; only 'aux_loss' or 'none'); "
        'change that, or set export.format = "none"'
    )
    load_run_config((), (*SMALL, "model.moe.balance=bias", "export.format=none"))


def test_a_run_cannot_leave_its_folder_by_its_name() -> None:
    (found,) = problems("run.name=../x")
    assert "must match pattern" in found


def test_checking_a_configuration_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from launcher.config import load_run_config; "
        "load_run_config((), ['model.preset=moe-7m', 'data.tokenizer.vocab_size=512']); "
        "print([name for name in ('torch', 'numpy', 'transformers', 'tokenizers', 'datasets') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"
