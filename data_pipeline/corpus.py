"""A corpus is a list of documents; this module says what a source must offer, and opens the configured one."""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text, and where a person finds it (`json/decoder.py`, `part-0.jsonl:17`)."""

    name: str
    text: str


class Corpus(Protocol):
    """Documents that can be read in any order. Every method raises DataError for a document that cannot be used."""

    def stamp(self) -> str:
        """Changes whenever the corpus may have changed (paths, sizes, times); costs no reading."""

    def fingerprint(self) -> str:
        """Changes exactly when the content or a relative path changes; reads everything."""

    def document_hashes(self) -> NDArray[np.uint64]:
        """One hash a document, [num_documents]. It gives a document its side of the split and its place in the order,
        so it is made of the document alone, never of its position."""

    def read(self, index: int) -> Document:
        """The document at an index of `document_hashes`."""


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that a config names. Raises DataError when there is nothing to read."""
    # Each source is imported where it is chosen: one of them needs an optional package.
    if config.source == "huggingface":
        from data_pipeline.huggingface_source import HuggingFaceCorpus

        return HuggingFaceCorpus(config)
    if config.source == "jsonl":
        from data_pipeline.jsonl_source import JsonlCorpus

        return JsonlCorpus(config)
    from data_pipeline.file_source import FileCorpus

    return FileCorpus(config)


def document_hash(identity: str, *, name: str) -> int:
    """64 evenly spread bits of a document's identity (its relative path or its text)."""
    try:
        content = identity.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name}: the text holds half a surrogate pair (character {error.start}), which is no Unicode text: "
            "repair or remove this record"
        ) from error
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
