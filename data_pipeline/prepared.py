"""A prepared data set, as every rank sees it: a folder that is whole, with its manifest."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from data_pipeline.errors import DataError
from data_pipeline.files import sha256_of_file
from data_pipeline.manifest import (
    BASELINES_FILE,
    HELD_OUT_FILE,
    TOKEN_BYTES_FILE,
    TOKENIZER_FILE,
    Manifest,
    Split,
    read_manifest,
)
from data_pipeline.shards import TokenStream, check_shard

_Baselines = TypeAdapter(dict[str, int | float])


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Token shards, their tokenizer and their manifest. Made by `load_prepared`, which has checked the files."""

    directory: Path
    manifest: Manifest

    @cached_property
    def manifest_hash(self) -> str:
        """Hex SHA-256 that names the content; part of the sample order."""
        return self.manifest.hash

    @property
    def tokenizer_path(self) -> Path:
        """The `tokenizer.json`."""
        return self.directory / TOKENIZER_FILE

    @cached_property
    def token_bytes(self) -> NDArray[np.int32]:
        """UTF-8 bytes of text behind each token id, int32 [vocab_size]; 0 for special tokens."""
        return np.load(self.directory / TOKEN_BYTES_FILE)

    @cached_property
    def held_out_documents(self) -> list[str]:
        """Where each held-out document comes from (`json/decoder.py`, `part-0.jsonl:17`), in the order of the stream."""
        return json.loads((self.directory / HELD_OUT_FILE).read_bytes())

    def stream(self, split: Split) -> TokenStream:
        """The split's token ids: for each document the separator, then its text."""
        return TokenStream(self.directory, self.manifest, split)


def load_prepared(directory: str | Path, *, verify: bool = True) -> PreparedData:
    """Opens a prepared data set; sizes and small files are always checked, the shards' hashes with `verify`.

    Raises DataError, naming the file, for a folder that is no data set, and for a file that is missing or changed.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name, sha256 in manifest.files.items():
        path = directory / name
        mend = f"delete {directory}, then run `mega data prepare`"
        if not path.is_file():
            raise DataError(f"{path}: this file is missing: {mend}")
        if sha256_of_file(path) != sha256:
            raise DataError(f"{path}: the content does not match the hash in its manifest: {mend}")
    for split in manifest.splits.values():
        for shard in split.shards:
            check_shard(directory, shard, manifest, verify=verify)
    prepared = PreparedData(directory=directory, manifest=manifest)
    compression_baselines(prepared)  # if it is damaged, better now than at the end of a run
    return prepared


def compression_baselines(prepared: PreparedData) -> dict[str, float]:
    """What general compressors need for the held-out text, in bits a byte: `gzip_bits_per_byte` (gzip -9) and
    `xz_bits_per_byte` (xz -9), of its first `num_bytes` (at most 16 MiB). Empty when nothing is held out.

    Raises DataError when their file is missing or damaged.
    """
    path = prepared.directory / BASELINES_FILE
    mend = f"delete {prepared.directory}, then run `mega data prepare`"
    try:
        return dict(_Baselines.validate_json(path.read_bytes()))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: {mend}") from error
    except ValidationError as error:
        raise DataError(f"{path}: these are no figures of compressors: {mend}") from error
