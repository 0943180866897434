"""Fills a folder with a prepared data set; `prepare` decides when, and when it counts.

Shapes: N documents, S tokens, V vocabulary.
"""

import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_pipeline.config import DataConfig
from data_pipeline.corpus import Corpus, Document
from data_pipeline.errors import DataError
from data_pipeline.files import sha256_of_file, sync_to_disk, write_durably
from data_pipeline.manifest import (
    BASELINES_FILE,
    HELD_OUT_FILE,
    MANIFEST_FILE,
    TOKEN_BYTES_FILE,
    TOKENIZER_FILE,
    Manifest,
    Split,
    SplitManifest,
)
from data_pipeline.shards import ShardWriter, token_dtype
from data_pipeline.tokenizer import (
    encode,
    load_tokenizer,
    separator_id,
    token_byte_lengths,
    tokenizer_file,
    train_tokenizer,
)

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of it done, 0 to 1."""

# Enough texts to keep every core busy, few enough to hold in memory.
_CHARACTERS_AT_ONCE = 4 * 2**20
# xz needs half a second a MiB; a sample of this size tells as much as the whole.
_BASELINE_BYTES = 16 * 2**20
# A tokenizer may put a space before a document or normalise a letter, but not lose text.
_BYTES_TOLERATED = 0.01


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    """A tokenizer with what the shards need to know of it."""

    tokenizer: Tokenizer
    name: str
    separator: int
    token_bytes_V: NDArray[np.int32]

    @property
    def dtype_name(self) -> str:
        return "uint16" if len(self.token_bytes_V) <= 2**16 else "uint32"


@dataclass(frozen=True, kw_only=True)
class _WrittenSplit:
    manifest: SplitManifest
    document_names: list[str]
    num_empty: int


def build(config: DataConfig, corpus: Corpus, key: str, directory: Path, report: Progress) -> None:
    """Writes tokenizer, shards, and last of all the manifest into an empty folder. Raises DataError for bad input."""
    indexes = _split_documents(config, corpus)
    vocabulary = _make_tokenizer(config, corpus, indexes["train"], directory, report)
    written = {
        split: _write_split(config, corpus, split, indexes_N, vocabulary, directory, report)
        for split, indexes_N in indexes.items()
    }
    _check_splits(config, written)
    report("compressing held-out text for comparison", 0.0)
    np.save(directory / TOKEN_BYTES_FILE, vocabulary.token_bytes_V)
    sync_to_disk(directory / TOKEN_BYTES_FILE)
    write_durably(directory / HELD_OUT_FILE, json.dumps(written["held_out"].document_names, indent=1).encode())
    write_durably(directory / BASELINES_FILE, json.dumps(_compress(corpus, indexes["held_out"])).encode())
    manifest = Manifest(
        key=key,
        source=config.source,
        vocab_size=len(vocabulary.token_bytes_V),
        eot_id=vocabulary.separator,
        end_of_text=config.tokenizer.end_of_text,
        token_dtype=vocabulary.dtype_name,
        num_empty_documents=sum(split.num_empty for split in written.values()),
        files={name: sha256_of_file(directory / name) for name in (TOKENIZER_FILE, TOKEN_BYTES_FILE, HELD_OUT_FILE)},
        splits={name: split.manifest for name, split in written.items()},
    )
    write_durably(directory / MANIFEST_FILE, manifest.model_dump_json(indent=1).encode())


def _split_documents(config: DataConfig, corpus: Corpus) -> dict[Split, NDArray[np.int64]]:
    """Indexes of each split's documents, in the order of their hashes: the smallest hashes are held out."""
    hashes_N = corpus.document_hashes()
    if not hashes_N.size:
        raise DataError(f"{_corpus_name(config)}: no document in it: correct data.path or data.file_pattern")
    order_N = np.argsort(hashes_N, kind="stable")
    num_held_out = 0
    if config.held_out_fraction > 0:
        # Above 0, at least one document is held out, together with any that equal it.
        limit = max(int(config.held_out_fraction * 2**64), int(hashes_N.min()))
        num_held_out = int(np.count_nonzero(hashes_N <= np.uint64(limit)))
    if num_held_out == len(order_N):
        raise DataError(
            f"{_corpus_name(config)}: all {len(order_N)} documents would be held out and none left to train on: add "
            "documents (a file is one document), or set data.held_out_fraction = 0"
        )
    return {"train": order_N[num_held_out:], "held_out": order_N[:num_held_out]}


def _make_tokenizer(
    config: DataConfig, corpus: Corpus, train_N: NDArray[np.int64], directory: Path, report: Progress
) -> _Vocabulary:
    path = directory / TOKENIZER_FILE
    if config.tokenizer.path is not None:
        given = tokenizer_file(config.tokenizer.path)
        name = str(given)
        write_durably(path, given.read_bytes())
        tokenizer = load_tokenizer(given)
    else:
        report("training the tokenizer", 0.0)
        name = path.name
        sample = _first_texts(corpus, train_N, config.tokenizer.sample_bytes)
        tokenizer = train_tokenizer(sample, config.tokenizer)
        write_durably(path, tokenizer.to_str(pretty=True).encode())
    return _Vocabulary(
        tokenizer=tokenizer,
        name=name,
        separator=separator_id(tokenizer, config.tokenizer.end_of_text, name=name),
        token_bytes_V=token_byte_lengths(tokenizer),
    )


def _first_texts(corpus: Corpus, indexes_N: NDArray[np.int64], num_bytes: int) -> Iterator[str]:
    for index in indexes_N.tolist():
        if num_bytes <= 0:
            return
        text = corpus.read(index).text
        num_bytes -= len(text.encode())
        yield text


def _write_split(
    config: DataConfig,
    corpus: Corpus,
    split: Split,
    indexes_N: NDArray[np.int64],
    vocabulary: _Vocabulary,
    directory: Path,
    report: Progress,
) -> _WrittenSplit:
    writer = ShardWriter(directory, split, dtype=token_dtype(vocabulary.dtype_name), shard_tokens=config.shard_tokens)
    names: list[str] = []
    num_bytes = num_tokens = num_token_bytes = num_read = 0
    stage = f"tokenizing {split.replace('_', '-')} documents"
    for documents in _batches(corpus, indexes_N):
        report(stage, num_read / len(indexes_N))
        num_read += len(documents)
        texts = [document.text for document in documents if document.text]
        names += [document.name for document in documents if document.text]
        for text, tokens_S in zip(texts, encode(vocabulary.tokenizer, texts), strict=True):
            writer.append(np.concatenate([[vocabulary.separator], tokens_S]))
            num_tokens += 1 + tokens_S.size
            num_bytes += len(text.encode())
            num_token_bytes += int(vocabulary.token_bytes_V[tokens_S].sum())
    shards = writer.close()
    if abs(num_token_bytes - num_bytes) > len(names) + _BYTES_TOLERATED * num_bytes:
        raise DataError(
            f"{vocabulary.name}: this tokenizer keeps {num_token_bytes} of {num_bytes} bytes of text: set "
            "data.tokenizer.path to a byte-level one, or leave it out to train one"
        )
    return _WrittenSplit(
        manifest=SplitManifest(num_tokens=num_tokens, num_documents=len(names), num_bytes=num_bytes, shards=shards),
        document_names=names if split == "held_out" else [],
        num_empty=len(indexes_N) - len(names),
    )


def _batches(corpus: Corpus, indexes_N: NDArray[np.int64]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_characters = 0
    for index in indexes_N.tolist():
        batch.append(corpus.read(index))
        num_characters += len(batch[-1].text)
        if num_characters >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _check_splits(config: DataConfig, written: dict[Split, _WrittenSplit]) -> None:
    if not written["train"].manifest.num_documents:
        raise DataError(f"{_corpus_name(config)}: every training document is empty: correct data.path")
    if config.held_out_fraction > 0 and not written["held_out"].manifest.num_documents:
        raise DataError(
            f"{_corpus_name(config)}: every held-out document is empty: raise data.held_out_fraction, or set it to 0"
        )


def _compress(corpus: Corpus, held_out_N: NDArray[np.int64]) -> dict[str, float]:
    text = "".join(_first_texts(corpus, held_out_N, _BASELINE_BYTES)).encode()[:_BASELINE_BYTES]
    if not text:
        return {}
    return {
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9, mtime=0)) / len(text),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
        "num_bytes": len(text),
    }


def _corpus_name(config: DataConfig) -> str:
    return config.path or "the standard library's sources"
