"""Token shards: a split's stream of token ids, cut into files of equal length and mapped into memory.

Shapes: S tokens.
"""

import hashlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.files import sha256_of_file, sync_to_disk
from data_pipeline.manifest import Manifest, ShardManifest, Split

_ITEMS_AT_ONCE = 2**24


def token_dtype(name: str) -> np.dtype:
    """The little-endian numpy type of a manifest's `token_dtype`."""
    return np.dtype(name).newbyteorder("<")


class ShardWriter:
    """Appends token ids to `<split>-00000.bin`, `<split>-00001.bin`, ..., hashing what it writes."""

    def __init__(self, directory: Path, split: Split, *, dtype: np.dtype, shard_tokens: int) -> None:
        self._directory, self._split, self._dtype, self._shard_tokens = directory, split, dtype, shard_tokens
        self._shards: list[ShardManifest] = []
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._num_tokens = 0

    def append(self, tokens_S: NDArray[np.integer]) -> None:
        """Ids must fit the dtype. A document may continue in the next shard."""
        while tokens_S.size:
            if self._file is None:
                self._file = self._next_path().open("wb")
            part_S = tokens_S[: self._shard_tokens - self._num_tokens]
            content = part_S.astype(self._dtype).tobytes()
            self._file.write(content)
            self._hash.update(content)
            self._num_tokens += part_S.size
            tokens_S = tokens_S[part_S.size :]
            if self._num_tokens == self._shard_tokens:
                self._finish_shard()

    def close(self) -> tuple[ShardManifest, ...]:
        """Everything is on the disk when this returns."""
        if self._file is not None:
            self._finish_shard()
        return tuple(self._shards)

    def _next_path(self) -> Path:
        return self._directory / f"{self._split}-{len(self._shards):05d}.bin"

    def _finish_shard(self) -> None:
        assert self._file is not None, "a shard is open"
        path = self._next_path()
        self._file.close()
        sync_to_disk(path)
        self._shards.append(ShardManifest(file=path.name, num_tokens=self._num_tokens, sha256=self._hash.hexdigest()))
        self._file, self._hash, self._num_tokens = None, hashlib.sha256(), 0


class TokenStream:
    """The shards of one split read as one sequence of token ids. Files are mapped when first needed."""

    def __init__(self, directory: Path, manifest: Manifest, split: Split) -> None:
        self._directory, self._vocab_size = directory, manifest.vocab_size
        self._dtype = token_dtype(manifest.token_dtype)
        self._shards = manifest.splits[split].shards
        self._starts = np.cumsum([0, *(shard.num_tokens for shard in self._shards)])
        self._maps: dict[int, np.memmap] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) of the stream as int64 [stop - start]. Raises DataError for an id beyond the vocabulary."""
        assert 0 <= start < stop <= len(self), f"tokens [{start}, {stop}) of {len(self)}"
        parts: list[NDArray[np.int64]] = []
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            shard_start, shard_stop = int(self._starts[shard]), int(self._starts[shard + 1])
            part_S = self._map(shard)[start - shard_start : min(stop, shard_stop) - shard_start].astype(np.int64)
            if part_S.max() >= self._vocab_size:
                raise _beyond_vocabulary(self._path(shard), int(part_S.max()), self._vocab_size)
            parts.append(part_S)
            start, shard = shard_stop, shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _path(self, shard: int) -> Path:
        return self._directory / self._shards[shard].file

    def _map(self, shard: int) -> np.memmap:
        if shard not in self._maps:
            path = self._path(shard)
            try:
                self._maps[shard] = np.memmap(path, self._dtype, mode="r")
            except OSError as error:
                raise DataError(f"{path}: {error.strerror}: run `mega data prepare` again") from error
        return self._maps[shard]


def check_shard(directory: Path, shard: ShardManifest, manifest: Manifest, *, verify: bool) -> None:
    """Raises DataError for a shard that is missing or too short or long; with `verify`, reads it whole and also checks
    its hash and that every id is in the vocabulary."""
    path = directory / shard.file
    dtype = token_dtype(manifest.token_dtype)
    mend = f"delete {directory}, then run `mega data prepare`"
    if not path.is_file():
        raise DataError(f"{path}: this shard is missing: {mend}")
    needed = shard.num_tokens * dtype.itemsize
    if path.stat().st_size != needed:
        raise DataError(f"{path}: {path.stat().st_size} bytes, its manifest says {needed}: {mend}")
    if not verify:
        return
    if sha256_of_file(path) != shard.sha256:
        raise DataError(f"{path}: the content does not match the hash in its manifest: {mend}")
    tokens_S = np.memmap(path, dtype, mode="r")
    for start in range(0, len(tokens_S), _ITEMS_AT_ONCE):
        largest = int(tokens_S[start : start + _ITEMS_AT_ONCE].max())
        if largest >= manifest.vocab_size:
            raise _beyond_vocabulary(path, largest, manifest.vocab_size)


def _beyond_vocabulary(path: Path, token: int, vocab_size: int) -> DataError:
    return DataError(
        f"{path}: token id {token} is beyond the vocabulary of {vocab_size}: the shard belongs to another tokenizer; "
        f"delete {path.parent}, then run `mega data prepare`"
    )
