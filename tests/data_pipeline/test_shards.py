from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest, SplitManifest
from data_pipeline.shards import ShardWriter, TokenStream, check_shard, token_dtype


def _write(folder: Path, tokens: np.ndarray, *, shard_tokens: int, dtype: str = "uint16", vocab_size: int = 70_000):
    writer = ShardWriter(folder, "train", dtype=token_dtype(dtype), shard_tokens=shard_tokens)
    for part in np.array_split(tokens, 7):
        writer.append(part)
    shards = writer.close()
    empty = SplitManifest(num_tokens=0, num_documents=0, num_bytes=0, shards=())
    train = SplitManifest(num_tokens=tokens.size, num_documents=1, num_bytes=1, shards=shards)
    return Manifest(
        key="k",
        source="text",
        vocab_size=vocab_size,
        eot_id=0,
        end_of_text="e",
        token_dtype=dtype,
        num_empty_documents=0,
        files={},
        splits={"train": train, "held_out": empty},
    )


@pytest.mark.parametrize(("dtype", "top"), [("uint16", 2**16), ("uint32", 70_000)])
@pytest.mark.parametrize("shard_tokens", [1, 10, 33, 1000])
def test_stream_reads_back_what_was_appended(tmp_path: Path, dtype: str, top: int, shard_tokens: int) -> None:
    tokens = np.random.default_rng(0).integers(0, top, 100)
    manifest = _write(tmp_path, tokens, shard_tokens=shard_tokens, dtype=dtype)
    shards = manifest.splits["train"].shards
    assert [shard.num_tokens for shard in shards[:-1]] == [shard_tokens] * (len(shards) - 1)
    stream = TokenStream(tmp_path, manifest, "train")
    assert len(stream) == 100
    for start, stop in [(0, 100), (0, 1), (9, 11), (32, 67), (99, 100)]:
        read = stream.read(start, stop)
        assert read.dtype == np.int64
        assert np.array_equal(read, tokens[start:stop])
    for shard in shards:
        check_shard(tmp_path, shard, manifest, verify=True)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    manifest = _write(tmp_path, np.arange(10), shard_tokens=5)
    (tmp_path / "train-00001.bin").unlink()
    with pytest.raises(DataError, match=r"train-00001\.bin: this shard is missing: delete .*mega data prepare"):
        check_shard(tmp_path, manifest.splits["train"].shards[1], manifest, verify=False)
    with pytest.raises(DataError, match=r"train-00001\.bin: No such file"):
        TokenStream(tmp_path, manifest, "train").read(0, 10)


def test_a_short_shard_is_named_without_reading_it(tmp_path: Path) -> None:
    manifest = _write(tmp_path, np.arange(10), shard_tokens=10)
    path = tmp_path / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train-00000\.bin: 19 bytes, its manifest says 20"):
        check_shard(tmp_path, manifest.splits["train"].shards[0], manifest, verify=False)


def test_a_changed_shard_is_named_when_verified(tmp_path: Path) -> None:
    manifest = _write(tmp_path, np.arange(10), shard_tokens=10)
    path = tmp_path / "train-00000.bin"
    path.write_bytes(b"\x01" + path.read_bytes()[1:])
    shard = manifest.splits["train"].shards[0]
    check_shard(tmp_path, shard, manifest, verify=False)
    with pytest.raises(DataError, match=r"train-00000\.bin: the content does not match the hash"):
        check_shard(tmp_path, shard, manifest, verify=True)


def test_ids_beyond_the_vocabulary_are_named(tmp_path: Path) -> None:
    manifest = _write(tmp_path, np.arange(10), shard_tokens=5, vocab_size=8)
    message = r"train-00001\.bin: token id 9 is beyond the vocabulary of 8: .*another tokenizer"
    with pytest.raises(DataError, match=message):
        check_shard(tmp_path, manifest.splits["train"].shards[1], manifest, verify=True)
    stream = TokenStream(tmp_path, manifest, "train")
    assert stream.read(0, 8).tolist() == list(range(8))
    with pytest.raises(DataError, match=message):
        stream.read(0, 10)
