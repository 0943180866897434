"""The manifest of a prepared data set: what lies in its folder, with counts and hashes."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.errors import DataError
from data_pipeline.files import sha256_of_json

Split = Literal["train", "held_out"]

MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
TOKEN_BYTES_FILE = "token_bytes.npy"
HELD_OUT_FILE = "held_out_documents.json"
BASELINES_FILE = "baselines.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ShardManifest(_Record):
    """One file of tokens; the shards of a split, in order, are one stream."""

    file: str
    """Name in the data set's folder."""
    num_tokens: int
    """Tokens in it."""
    sha256: str
    """Hex hash of its bytes."""


class SplitManifest(_Record):
    """One split: its shards, and what they hold."""

    num_tokens: int
    """Tokens of all shards, separators included."""
    num_documents: int
    """Documents, each of which starts with one separator."""
    num_bytes: int
    """UTF-8 bytes of the documents' text."""
    shards: tuple[ShardManifest, ...]
    """In the order of the stream."""


class Manifest(_Record):
    """A prepared data set. It holds nothing of the machine or the time: equal content gives an equal manifest."""

    format_version: Literal[1] = 1
    """Of this layout of files."""
    key: str
    """Hash of the settings and the corpus that this was made from."""
    source: str
    """`data.source` of the config that it was made from."""
    vocab_size: int
    """Every token id is below it."""
    eot_id: int
    """Id of the separator, which starts every document."""
    end_of_text: str
    """The separator's text."""
    token_dtype: Literal["uint16", "uint32"]
    """Of the shards, little-endian."""
    num_empty_documents: int
    """Documents without a single byte: they are in no split."""
    files: dict[str, str]
    """Every other file that training needs, and the hex SHA-256 of its bytes. `baselines.json` is not among them: it
    depends on the compressors of the machine that wrote it, and this manifest on nothing but content."""
    splits: dict[Split, SplitManifest]
    """Both splits; `held_out` is empty when `data.held_out_fraction` is 0."""

    @property
    def tokenizer_sha256(self) -> str:
        """Hex hash of the tokenizer's file."""
        return self.files[TOKENIZER_FILE]

    @property
    def hash(self) -> str:
        """Hex hash of all of the above: it names the content of the data set, on every machine."""
        return sha256_of_json(self.model_dump(mode="json"))


def read_manifest(directory: Path) -> Manifest:
    """Raises DataError when the folder is no whole prepared data set."""
    path = directory / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: this folder is no prepared data set; give another one") from error
    except ValidationError as error:
        raise DataError(
            f"{path}: damaged or of another version ({error.errors()[0]['msg']}): delete the folder, then run "
            "`mega data prepare`"
        ) from error
