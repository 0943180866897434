"""Prompts in, text out."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer
from torch import Tensor

from megamodel.errors import ModelError
from megamodel.generate.config import GenerateConfig
from megamodel.generate.text import generate_text
from megamodel.model.decoder import Decoder
from tests.megamodel.small import build, small_config
from tests.megamodel.tokenizers_for_tests import write_small_tokenizer


@pytest.fixture
def tokenizer_path(tmp_path: Path) -> Path:
    return write_small_tokenizer(tmp_path / "tokenizer.json")


def _decoder(**fields: Any) -> Decoder:
    return build(small_config(vocab_size=320, **fields))


class Script(Decoder):
    """A decoder that says what it is told, whatever it reads, and keeps what it was given."""

    def follow(self, ids: list[int]) -> None:
        self.ids = ids
        self.given: list[list[int]] = []

    def forward(self, tokens_BS: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.given.append(tokens_BS[0].tolist())
        logits = torch.zeros(*tokens_BS.shape, self.config.vocab_size)
        logits[:, -1, self.ids[len(self.given) - 1]] = 50.0
        return logits


def _script(ids: list[int]) -> Script:
    script = Script(small_config(vocab_size=320))
    script.follow(ids)
    return script


def test_starts_with_end_of_text_and_stops_at_it(tokenizer_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    script = _script([*tokenizer.encode("turn a").ids, tokenizer.token_to_id("<|endoftext|>"), 5, 5])
    config = GenerateConfig(prompts=["    re"], max_new_tokens=50)
    (done,) = generate_text(script, config, tokenizer_path=tokenizer_path)
    assert script.given[0] == [tokenizer.token_to_id("<|endoftext|>"), *tokenizer.encode("    re").ids]
    assert done.text == "turn a"
    assert done.prompt == "    re"
    assert done.finish == "stop"
    assert done.num_tokens == len(tokenizer.encode("turn a").ids)


def test_pieces_hold_whole_characters_and_add_up(tokenizer_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    text = "x = 'naïve – 零 🙂'"
    ids = tokenizer.encode(text).ids
    pieces: list[str] = []
    (done,) = generate_text(
        _script(ids),
        GenerateConfig(prompts=["é"], max_new_tokens=len(ids)),
        tokenizer_path=tokenizer_path,
        on_text=lambda row, piece: pieces.append(piece),
    )
    assert done.text == text == "".join(pieces)
    assert len(pieces) > 5
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_bytes_cut_in_a_character_still_come_out(tokenizer_path: Path) -> None:
    ids = Tokenizer.from_file(str(tokenizer_path)).encode("ab🙂").ids[:-1]
    pieces: list[str] = []
    (done,) = generate_text(
        _script(ids),
        GenerateConfig(prompts=[""], max_new_tokens=len(ids)),
        tokenizer_path=tokenizer_path,
        on_text=lambda row, piece: pieces.append(piece),
    )
    assert done.text.startswith("ab\N{REPLACEMENT CHARACTER}")
    assert "".join(pieces) == done.text


def test_streamed_rows_of_a_batch(tokenizer_path: Path) -> None:
    config = GenerateConfig(prompts=["import", "", "class Node:"], max_new_tokens=12, seed=3)
    pieces: dict[int, str] = defaultdict(str)

    def collect(row: int, piece: str) -> None:
        pieces[row] += piece

    done = generate_text(_decoder(), config, tokenizer_path=tokenizer_path.parent, on_text=collect)
    assert [row.prompt for row in done] == config.prompts
    assert set(pieces) == {0, 1, 2}
    assert all(row.num_tokens == 12 or row.finish == "stop" for row in done)
    again = generate_text(_decoder(), config, tokenizer_path=tokenizer_path.parent)
    assert again == done


def test_ids_beyond_the_tokenizer_are_never_drawn(tokenizer_path: Path) -> None:
    script = _script([310] * 8)  # the model has 320 ids, the tokenizer 300
    generate_text(script, GenerateConfig(prompts=["x"], max_new_tokens=8), tokenizer_path=tokenizer_path)
    assert all(token < 300 for given in script.given for token in given)


def test_further_stop_tokens(tokenizer_path: Path) -> None:
    ids = Tokenizer.from_file(str(tokenizer_path)).encode("a;b").ids
    config = GenerateConfig(prompts=["x"], stop=[";"], max_new_tokens=len(ids))
    (done,) = generate_text(_script(ids), config, tokenizer_path=tokenizer_path)
    assert (done.text, done.finish) == ("a", "stop")


def test_prompt_too_long(tokenizer_path: Path) -> None:
    with pytest.raises(ModelError, match=r"prompt 1 has \d+ tokens and the model takes max_seq_len = 64"):
        generate_text(_decoder(), GenerateConfig(prompts=["0123456789" * 10]), tokenizer_path=tokenizer_path)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (GenerateConfig(stop=["not one token"]), {}, "'not one token' is not one token of the tokenizer"),
        (GenerateConfig(), {"end_of_text": "</s>"}, "'</s>' is not one token of the tokenizer"),
        (GenerateConfig(), {"tokenizer_path": "nowhere.json"}, "there is no tokenizer at nowhere.json"),
    ],
)
def test_refused(tokenizer_path: Path, config: GenerateConfig, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        generate_text(_decoder(), config, **{"tokenizer_path": tokenizer_path, **options})


def test_damaged_tokenizer(tokenizer_path: Path) -> None:
    tokenizer_path.write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a tokenizer that the tokenizers library reads"):
        generate_text(_decoder(), GenerateConfig(), tokenizer_path=tokenizer_path)


def test_tokenizer_of_another_model(tokenizer_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has 300 tokens and the model's vocab_size is 97"):
        generate_text(build(small_config()), GenerateConfig(), tokenizer_path=tokenizer_path)


@pytest.mark.parametrize(
    "fields", [{"prompts": []}, {"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_new_tokens": 0}, {"beams": 2}]
)
def test_config_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GenerateConfig(**fields)
