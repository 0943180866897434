"""The only place that imports Hugging Face transformers. Nothing here uses the network.

Shape suffixes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamodel.errors import ConversionError, ParityError


def require_transformers() -> None:
    """Raises ConversionError where transformers is not installed; does not load it."""
    if importlib.util.find_spec("transformers") is None:
        raise ConversionError(
            "checking an export needs transformers, which is not installed; install the extra: pip install 'mega[hf]'"
        )


def reload_logits(folder: Path, tokens_BS: Tensor) -> Tensor:
    """Logits (B, S, V) of the checkpoint in `folder` as transformers computes them in fp32 on the CPU.

    Raises ParityError where transformers cannot load it, or finds a weight missing, unexpected or of another shape.
    """
    require_transformers()
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    had_progress_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # Whatever goes wrong there, the export is not one that transformers loads.
        raise ParityError(f"transformers cannot load the export in {folder}: {_first_line(error)}") from error
    finally:
        if had_progress_bar:
            logging.enable_progress_bar()
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise ParityError(
                f"transformers reports {kind} in the export in {folder}: {sorted(map(str, report[kind]))[:3]}"
            )
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=tokens_BS, use_cache=False).logits
    return logits.float()


def reload_token_ids(folder: Path, text: str) -> list[int]:
    """Ids of `text`, special tokens included, by the tokenizer in `folder`. Raises ParityError where it cannot be loaded."""
    require_transformers()
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids: list[int] = tokenizer(text)["input_ids"]
    except Exception as error:  # As above.
        raise ParityError(f"transformers cannot load the tokenizer in {folder}: {_first_line(error)}") from error
    return ids


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
