"""A tokenizer as Hugging Face's AutoTokenizer and inference engines expect it on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from megamodel.errors import ConversionError


@dataclass(frozen=True, kw_only=True)
class WrittenTokenizer:
    """What was written."""

    end_of_text_id: int
    vocab_size: int
    tokenizer: Tokenizer
    """With the post-processor that puts the end-of-text token first."""


def write_tokenizer(folder: Path, source: str | Path, *, end_of_text: str, max_seq_len: int) -> WrittenTokenizer:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json into `folder`.

    source: a `tokenizer.json`, or a folder that holds one. Every text gets `end_of_text` in front, as every document had in
    training: the model has never seen a text without it. Raises ConversionError where it cannot be read or lacks it.
    """
    file = Path(source)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise ConversionError(
            f"there is no tokenizer at {file}; give the tokenizer.json that the model was trained with"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises plain Exception for every kind of bad file.
        raise ConversionError(f"{file} is not a tokenizer that the tokenizers library reads: {error}") from error
    end_of_text_id = tokenizer.token_to_id(end_of_text)
    if end_of_text_id is None:
        raise ConversionError(
            f"{file} has no token {end_of_text!r}; give the tokenizer.json that the model was trained with"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # The one in place only moves offsets (byte-level), or adds tokens that training never put there.
    tokenizer.post_processor = TemplateProcessing(
        single=f"{end_of_text} $A",
        pair=f"{end_of_text} $A {end_of_text} $B",
        special_tokens=[(end_of_text, end_of_text_id)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": end_of_text, "eos_token": end_of_text, "pad_token": end_of_text}
    settings = {
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return WrittenTokenizer(end_of_text_id=end_of_text_id, vocab_size=tokenizer.get_vocab_size(), tokenizer=tokenizer)
