"""Corpora made for tests, and the reading of a prepared data set back into text."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data_pipeline.config import DataConfig, TokenizerConfig
from data_pipeline.manifest import Split
from data_pipeline.prepared import PreparedData

NUM_FILES = 30


def document_text(number: int) -> str:
    """Distinct, of different lengths, and not only ASCII."""
    return f"document {number}: größer ☃ " + "the quick brown fox\n" * (number % 7 + 1)


def write_text_folder(folder: Path, num_files: int) -> None:
    """`a/0.txt`, `b/1.txt`, ..."""
    for number in range(num_files):
        path = folder / "ab"[number % 2] / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document_text(number), encoding="utf-8")


def write_jsonl(path: Path, texts: list[str]) -> None:
    """One record a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def tiny(path: Path, cache: Path, **settings: object) -> DataConfig:
    """A config for a corpus of a few documents."""
    defaults = {"source": "text", "tokenizer": TokenizerConfig(vocab_size=257), "held_out_fraction": 0.3}
    return DataConfig(**{**defaults, "path": str(path), "cache_directory": str(cache), **settings})


def texts_of(prepared: PreparedData, split: Split) -> list[str]:
    """The documents of a split, decoded from its shards."""
    stream = prepared.stream(split)
    tokens = stream.read(0, len(stream))
    starts = np.flatnonzero(tokens == prepared.manifest.eot_id)
    assert starts[0] == 0, "the separator starts every document"
    tokenizer = Tokenizer.from_file(str(prepared.tokenizer_path))
    return [tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]
