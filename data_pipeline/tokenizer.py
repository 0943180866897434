"""Byte-level BPE through the `tokenizers` library: training, loading, encoding, and the bytes behind each id."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipeline.config import TokenizerConfig
from data_pipeline.errors import DataError

# Longer texts are encoded in pieces: one text is the work of one thread, and costs some 100 bytes of memory a token.
_PIECE_CHARACTERS = 2**20
_BYTE_FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """A byte-level BPE with one special token, the separator, as id 0. Any text survives encoding and decoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[config.end_of_text],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_file(path: str) -> Path:
    """The `tokenizer.json` that a config names, itself or by its folder. Raises DataError when there is none."""
    given = Path(path).expanduser()
    found = given / "tokenizer.json" if given.is_dir() else given
    if not found.is_file():
        raise DataError(f"{found}: no such file: set data.tokenizer.path to a tokenizer.json or its folder")
    return found


def load_tokenizer(path: Path) -> Tokenizer:
    """Raises DataError when the file is no tokenizer."""
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    # The library raises plain Exception for whatever its reader meets.
    except Exception as error:
        raise DataError(
            f"{path}: not a tokenizer.json that `tokenizers` can read ({error}): give another one"
        ) from error


def separator_id(tokenizer: Tokenizer, end_of_text: str, *, name: str) -> int:
    """Id of the token that starts every document. Raises DataError when the tokenizer has no such special token."""
    special = {token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if end_of_text not in special:
        raise DataError(
            f"{name}: no special token {end_of_text!r}, only {sorted(special)}: set data.tokenizer.end_of_text to one "
            "of them"
        )
    return special[end_of_text]


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id; a vocabulary may have holes."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def token_byte_lengths(tokenizer: Tokenizer) -> NDArray[np.int32]:
    """UTF-8 bytes of text behind each token id, int32 [vocab_size]; 0 for special tokens and holes."""
    lengths_V = np.zeros(vocabulary_size(tokenizer), np.int32)
    is_byte_level = "ByteLevel" in _component_types(json.loads(tokenizer.to_str()))
    for token, id_ in tokenizer.get_vocab(with_added_tokens=False).items():
        lengths_V[id_] = len(token) if is_byte_level else _length_of_piece(token)
    for id_, added in tokenizer.get_added_tokens_decoder().items():
        lengths_V[id_] = 0 if added.special else len(added.content.encode())
    return lengths_V


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[NDArray[np.int64]]:
    """Token ids of each text, without separators; on all cores. A special token's name within a text stays text."""
    pieces: list[str] = []
    counts: list[int] = []
    for text in texts:
        before = len(pieces)
        pieces += _pieces(text)
        counts.append(len(pieces) - before)
    tokenizer.encode_special_tokens = True
    encodings = iter(tokenizer.encode_batch_fast(pieces, add_special_tokens=False))
    return [np.array([id_ for _ in range(count) for id_ in next(encodings).ids], np.int64) for count in counts]


def _pieces(text: str) -> Iterator[str]:
    """Cuts a long text after line ends where it can, so that few tokens differ from those of the whole text."""
    start = 0
    while start < len(text):
        stop = start + _PIECE_CHARACTERS
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def _component_types(state: dict[str, Any]) -> set[str]:
    """Types of the pre-tokenizer and of the decoder, within sequences too."""
    types: set[str] = set()
    pending = [state.get("pre_tokenizer"), state.get("decoder")]
    while pending:
        component = pending.pop()
        if component is not None:
            types.add(component["type"])
            pending += component.get("pretokenizers", []) + component.get("decoders", [])
    return types


def _length_of_piece(token: str) -> int:
    """Bytes behind a token of a vocabulary of the SentencePiece kind: `<0x0A>` is a byte, `▁` is a space."""
    return 1 if _BYTE_FALLBACK.fullmatch(token) else len(token.replace("▁", " ").encode())
