"""A finished model as a folder that Hugging Face transformers loads, checked by loading it.

Shape suffixes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamodel.convert.config import ExportConfig
from megamodel.convert.durable import sync, sync_folder
from megamodel.convert.hf import save_hf_model
from megamodel.convert.hf_config import family_for
from megamodel.convert.model_card import model_card
from megamodel.convert.origin import ORIGIN_NAME
from megamodel.convert.tokenizer_files import WrittenTokenizer, write_tokenizer
from megamodel.convert.transformers_adapter import reload_logits, reload_token_ids, require_transformers
from megamodel.errors import ConversionError, ParityError
from megamodel.model.config import ModelConfig
from megamodel.model.decoder import Decoder

MAX_LOGIT_DIFFERENCE = 1e-4
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CHECK_ROWS, _CHECK_TOKENS = 2, 64
_CHECK_TEXT = "def f(x):\n    return x + 1  # naïve – 零\n"


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """Where the export is, and what its check found."""

    path: Path
    family: str
    """Hugging Face's model_type."""
    num_parameters: int
    max_logit_difference: float
    """Largest absolute difference of logits between the trained model and the reloaded export."""
    files: list[str]


def export_hf(
    config: ModelConfig,
    model: Decoder,
    path: str | Path,
    *,
    tokenizer_path: str | Path,
    record: Mapping[str, Any],
    options: ExportConfig | None = None,
    end_of_text: str = "<|endoftext|>",
    title: str | None = None,
    origin: Mapping[str, Any] | None = None,
) -> ExportResult:
    """Writes weights, config, tokenizer, generation_config.json and a model card; reloads them through transformers in fp32
    and compares logits; only then does the folder get its name, in place of an older export.

    tokenizer_path: a `tokenizer.json`, or a folder that holds one. record: figures of the run for the model card. origin:
    what `read_origin` shall give back, such as which checkpoint this is.
    Raises ConversionError where the model, the tokenizer or the target cannot be used, or transformers is missing; ParityError
    (exit code 3) where the reloaded model differs. Either way nothing is left, and an older export stays.
    """
    options = options or ExportConfig()
    require_transformers()
    family = family_for(config)
    target = Path(path)
    _check_target(target)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        difference = _write_checked(config, model, partial, tokenizer_path, end_of_text, options)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        card = model_card(
            config,
            family,
            record,
            title=title or f"{family.architecture} trained with mega",
            num_parameters=num_parameters,
            max_difference=difference,
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        if origin is not None:
            _write_json(partial / ORIGIN_NAME, origin)
        _put_in_place(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return ExportResult(
        path=target,
        family=family.model_type,
        num_parameters=num_parameters,
        max_logit_difference=difference,
        files=sorted(file.name for file in target.iterdir()),
    )


def _write_checked(
    config: ModelConfig,
    model: Decoder,
    folder: Path,
    tokenizer_path: str | Path,
    end_of_text: str,
    options: ExportConfig,
) -> float:
    """Everything but the card; the largest difference of logits."""
    dtype = _DTYPES[options.dtype]
    tokenizer = write_tokenizer(folder, tokenizer_path, end_of_text=end_of_text, max_seq_len=config.max_seq_len)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConversionError(
            f"the tokenizer {tokenizer_path} has {tokenizer.vocab_size} tokens and the model's vocab_size is "
            f"{config.vocab_size}; give the tokenizer that the model was trained with"
        )
    special_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.end_of_text_id)
    save_hf_model(config, model, folder, dtype=dtype, max_shard_bytes=options.max_shard_bytes, extra_config=special_ids)
    _write_json(folder / "generation_config.json", {"do_sample": True, **special_ids})
    difference = _check_logits(config, model, folder, dtype)
    _check_tokenizer(folder, tokenizer)
    return difference


def _check_target(target: Path) -> None:
    """An older export may be replaced, anything else not."""
    replaced = _replaced(target)
    if not target.exists() and (replaced / "config.json").is_file():
        # A process killed between the two renames: the older export is still whole.
        replaced.rename(target)
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{target} is a file; name a folder for the export")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise ConversionError(f"{target} holds other files and no earlier export; name another folder for the export")


def _reference(config: ModelConfig, model: Decoder, dtype: torch.dtype) -> Decoder:
    """The trained model in fp32 on the CPU, its weights rounded as the export's are."""
    with torch.device("meta"):
        reference = Decoder(config)
    reference.to_empty(device="cpu")
    state = {name: tensor.detach().to("cpu", dtype).float() for name, tensor in model.state_dict().items()}
    reference.load_state_dict(state)
    return reference


def _check_logits(config: ModelConfig, model: Decoder, folder: Path, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)
    shape = (_CHECK_ROWS, min(_CHECK_TOKENS, config.max_seq_len))
    tokens_BS = torch.randint(0, config.vocab_size, shape, generator=generator)
    with torch.no_grad():
        expected_BSV: Tensor = _reference(config, model, dtype)(tokens_BS)
    difference = float((reload_logits(folder, tokens_BS) - expected_BSV).abs().max())
    # Written so that NaN fails too.
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise ParityError(
            f"the export, reloaded with transformers, gives logits that differ by {difference:.2e} (allowed "
            f"{MAX_LOGIT_DIFFERENCE:.0e}); it was not kept"
        )
    return difference


def _check_tokenizer(folder: Path, written: WrittenTokenizer) -> None:
    expected = written.tokenizer.encode(_CHECK_TEXT).ids
    found = reload_token_ids(folder, _CHECK_TEXT)
    if found != expected or found[:1] != [written.end_of_text_id]:
        raise ParityError(
            f"the tokenizer, reloaded with transformers, gives ids {found[:5]}... where {expected[:5]}... are right; "
            "the export was not kept"
        )


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _put_in_place(partial: Path, target: Path) -> None:
    """Renames, once all is on the disk; a folder cannot be renamed over another, so an older export steps aside first."""
    sync_folder(partial)
    replaced = _replaced(target)
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced(target: Path) -> Path:
    """Where an older export stands while the new one takes its name."""
    return target.with_name(target.name + ".replaced")
