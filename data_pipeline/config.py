"""The `[data]` section of a run's configuration. Imports neither numpy nor tokenizers, so that checks answer at once."""

from pathlib import PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Source = Literal["stdlib", "text", "jsonl", "huggingface"]

# Every byte value is a token of its own, and the separator is one more.
MIN_VOCAB_SIZE = 257


class TokenizerConfig(BaseModel):
    """Which tokenizer turns text into ids: one trained on this corpus, or a given `tokenizer.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    path: str | None = None
    """A `tokenizer.json`, or a folder that holds one. Left out: a byte-level BPE is trained on the training split."""

    vocab_size: int = Field(default=4096, ge=MIN_VOCAB_SIZE)
    """Size of the trained vocabulary in tokens, the separator included. Not used with `path`."""

    sample_bytes: int = Field(default=64 * 2**20, ge=1)
    """Training reads documents until they hold this many bytes. Not used with `path`."""

    end_of_text: str = Field(default="<|endoftext|>", min_length=1)
    """The special token that starts every document (and so also ends the one before)."""


class DataConfig(BaseModel):
    """Where the text comes from, and how it becomes rows of tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    source: Source = "stdlib"
    """`stdlib`: the Python sources of the running interpreter's standard library (tests left out); `text`: a file or a
    folder of UTF-8 text, one document a file; `jsonl`: one JSON object a line; `huggingface`: a data set read through
    `datasets` (needs the extra `hf`)."""

    path: str | None = None
    """A file or folder for `text` and `jsonl`; for `huggingface` a local path, or a name on the hub."""

    file_pattern: str | None = Field(default=None, min_length=1)
    """Which files below `path` to read, as a glob relative to it (for `stdlib`, to the standard library). Default: all of
    `stdlib`, `**/*.txt` for `text`, `**/*.jsonl` for `jsonl`. Not used when `path` is a file."""

    text_field: str = Field(default="text", min_length=1)
    """The field of a record that holds its text (`jsonl` and `huggingface`)."""

    subset: str | None = None
    """The configuration of a Hugging Face data set, where it has several."""

    split: str = Field(default="train", min_length=1)
    """The split of a Hugging Face data set to read; held-out documents are taken from it too."""

    held_out_fraction: float = Field(default=0.03, ge=0.0, lt=1.0)
    """Share of the documents (by count, 0 to 1) kept for validation. A hash of a file's relative path, or of a record's
    text, decides, so a document keeps its side when others come and go. Above 0, at least one document is held out."""

    cache_directory: str = Field(default=".cache/data", min_length=1)
    """Prepared data sets lie here, each under a key made of its content; all runs share them."""

    seq_len: int = Field(default=512, ge=1)
    """Length of a row in tokens. Rows are packed: documents follow one another without padding."""

    shard_tokens: int = Field(default=2**26, ge=1)
    """Tokens in one shard file (2 bytes a token up to a vocabulary of 65,536, else 4)."""

    document_mask: bool = True
    """Whether attention stays within a document where several share a row."""

    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    """The tokenizer."""

    @model_validator(mode="after")
    def _fields_fit_source(self) -> "DataConfig":
        if self.source == "stdlib" and self.path is not None:
            raise ValueError('path has no meaning with source = "stdlib": remove it, or set source = "text"')
        if self.file_pattern is not None and self.source == "huggingface":
            raise ValueError(f'file_pattern has no meaning with source = "{self.source}": remove it')
        if self.file_pattern is not None and PurePosixPath(self.file_pattern).is_absolute():
            raise ValueError(f"file_pattern must be relative to path, this is absolute: {self.file_pattern!r}")
        if self.source != "stdlib" and not self.path:
            raise ValueError(f'source = "{self.source}" needs path: the file or folder to read')
        return self
