"""Continues texts: tokenizer in front of, and behind, `generate_tokens`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from megamodel.errors import ModelError
from megamodel.generate.config import GenerateConfig
from megamodel.generate.sampler import Sampler
from megamodel.generate.tokens import generate_tokens
from megamodel.model.decoder import Decoder

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class GeneratedText:
    """One prompt and its continuation."""

    prompt: str
    text: str
    """The continuation, without the prompt."""
    num_tokens: int
    """Tokens of the continuation."""
    finish: Literal["stop", "length"]
    """Ended by a stop token, or by the limit on new tokens or the model's max_seq_len."""


def generate_text(
    model: Decoder,
    config: GenerateConfig,
    *,
    tokenizer_path: str | Path,
    end_of_text: str = END_OF_TEXT,
    on_text: Callable[[int, str], None] | None = None,
) -> list[GeneratedText]:
    """Continues every prompt of `config`. A sequence starts with the token `end_of_text`, as documents do in training, and
    stops at it.

    tokenizer_path: a `tokenizer.json`, or a folder that holds one. on_text(row, piece) is called as soon as new text
    is certain; a piece never ends within a character, and the pieces of a row add up to its text where that is valid
    UTF-8 (an untrained model may draw bytes that are not).
    Raises ModelError for a tokenizer that cannot be read or does not fit, a stop that is no token, or a prompt too long.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    size = tokenizer.get_vocab_size()
    if size > model.config.vocab_size:
        raise ModelError(
            f"the tokenizer {tokenizer_path} has {size} tokens and the model's vocab_size is {model.config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    start = _token_id(tokenizer, end_of_text, tokenizer_path)
    stop_ids = {start, *(_token_id(tokenizer, token, tokenizer_path) for token in config.stop)}
    prompts = [[start, *tokenizer.encode(prompt, add_special_tokens=False).ids] for prompt in config.prompts]
    pieces = [_TextStream(tokenizer, row, on_text) for row in range(len(prompts))]
    continuations = generate_tokens(
        model,
        prompts,
        sampler=Sampler(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p),
        max_new_tokens=config.max_new_tokens,
        stop_ids=stop_ids,
        usable_ids=size,
        generator=torch.Generator(model.output_weight.device).manual_seed(config.seed),
        on_token=lambda row, token: pieces[row].add(token),
    )
    return [
        GeneratedText(prompt=prompt, text=stream.finish(), num_tokens=len(done.tokens), finish=done.finish)
        for prompt, stream, done in zip(config.prompts, pieces, continuations, strict=True)
    ]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a `tokenizer.json`, or the one in a folder. Raises ModelError naming the file."""
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"there is no tokenizer at {file}; give the tokenizer.json that the model was trained with")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises plain Exception for every kind of bad file.
        raise ModelError(f"{file} is not a tokenizer that the tokenizers library reads: {error}") from error


def _token_id(tokenizer: Tokenizer, token: str, path: str | Path) -> int:
    number: int | None = tokenizer.token_to_id(token)
    if number is None:
        raise ModelError(f"{token!r} is not one token of the tokenizer {path}; name a token of its vocabulary")
    return number


class _TextStream:
    """Text of one row, handed on as it becomes certain."""

    def __init__(self, tokenizer: Tokenizer, row: int, on_text: Callable[[int, str], None] | None) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._row = row
        self._on_text = on_text
        self._tokens: list[int] = []
        self._sent = ""

    def add(self, token: int) -> None:
        self._tokens.append(token)
        if self._on_text is not None:
            self._send(self._stream.step(self._tokenizer, token) or "")

    def finish(self) -> str:
        """The whole text; sends what was held back, such as bytes that form no character."""
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if self._on_text is not None and text.startswith(self._sent):
            self._send(text[len(self._sent) :])
        return text

    def _send(self, piece: str) -> None:
        if piece and self._on_text is not None:
            self._sent += piece
            self._on_text(self._row, piece)
