from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from data_pipeline import tokenizer as tokenizer_module
from data_pipeline.config import TokenizerConfig
from data_pipeline.errors import DataError
from data_pipeline.tokenizer import (
    encode,
    load_tokenizer,
    separator_id,
    token_byte_lengths,
    tokenizer_file,
    train_tokenizer,
    vocabulary_size,
)

TEXTS = ["def f(x):\n    return x\n", "größer ☃ \x00\x7f\u0301", "    \t\n\n", "the the the then", ""]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(TEXTS * 3, TokenizerConfig(vocab_size=290))


def test_any_text_survives(trained: Tokenizer) -> None:
    texts = [*TEXTS, "\U0001f600 never seen 漢字"]
    for text, ids in zip(texts, encode(trained, texts), strict=True):
        assert trained.decode(ids.tolist()) == text


def test_token_bytes_count_the_text(trained: Tokenizer) -> None:
    token_bytes = token_byte_lengths(trained)
    assert token_bytes.dtype == np.int32
    assert token_bytes.shape == (vocabulary_size(trained),)
    for text, ids in zip(TEXTS, encode(trained, TEXTS), strict=True):
        assert token_bytes[ids].sum() == len(text.encode())
    assert token_bytes[0] == 0  # The separator.


def test_a_special_tokens_name_in_a_text_stays_text(trained: Tokenizer) -> None:
    text = "about <|endoftext|> as such"
    (ids,) = encode(trained, [text])
    assert separator_id(trained, "<|endoftext|>", name="x") == 0
    assert 0 not in ids
    assert trained.decode(ids.tolist(), skip_special_tokens=False) == text


def test_training_is_reproducible(trained: Tokenizer) -> None:
    assert train_tokenizer(TEXTS * 3, TokenizerConfig(vocab_size=290)).to_str() == trained.to_str()


def test_long_texts_are_cut_at_line_ends(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARACTERS", 10)
    texts = ["short", "a line\nanother line without end\n\nlast", "", "x" * 35]
    pieces = [list(tokenizer_module._pieces(text)) for text in texts]
    assert pieces[1][0] == "a line\n"
    assert max(len(piece) for text in pieces for piece in text) == 10
    for text, ids in zip(texts, encode(trained, texts), strict=True):
        assert trained.decode(ids.tolist()) == text


def test_given_file_or_folder(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(tokenizer_file(str(path))).to_str() == trained.to_str()


def test_errors_name_the_file(trained: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: no such file: set data\.tokenizer\.path"):
        tokenizer_file(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer\.json that `tokenizers` can read"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"x: no special token '</s>', only \['<\|endoftext\|>'\]: set data\.tokenizer"):
        separator_id(trained, "</s>", name="x")


def test_bytes_of_a_sentencepiece_vocabulary() -> None:
    vocab = {"<s>": 0, "<0x0A>": 1, "▁the": 2, "é": 3, "<0xE2>": 4}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens(["<tool>"])
    assert token_byte_lengths(tokenizer).tolist() == [0, 1, 4, 2, 1, 6]


def test_byte_level_within_a_sequence_is_seen() -> None:
    tokenizer = Tokenizer(models.BPE({"Ġ": 0, "é": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()])
    tokenizer.decoder = decoders.ByteLevel()
    assert token_byte_lengths(tokenizer).tolist() == [1, 1]
