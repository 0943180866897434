"""Continuations, one by one and in batches, against a loop without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamodel.errors import ModelError
from megamodel.generate.sampler import Sampler
from megamodel.generate.tokens import generate_tokens
from megamodel.model.decoder import Decoder
from tests.megamodel.small import MLA, MOE, build, random_tokens, small_config

GREEDY = Sampler(temperature=0)


def _prompts(decoder: Decoder, lengths: list[int]) -> list[list[int]]:
    return [random_tokens(decoder.config, 1, length, seed=length)[0].tolist() for length in lengths]


@torch.no_grad()
def _greedy_without_cache(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(decoder(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("fields", [{}, {"mla": MLA}, {"moe": MOE, "qk_norm": True}])
@pytest.mark.parametrize("lengths", [[5], [4, 4], [1, 9, 4]])
def test_greedy_equals_a_loop_without_a_cache(fields: dict[str, Any], lengths: list[int]) -> None:
    decoder = build(small_config(**fields))
    prompts = _prompts(decoder, lengths)
    found = generate_tokens(decoder, prompts, sampler=GREEDY, max_new_tokens=10)
    assert [done.tokens for done in found] == [_greedy_without_cache(decoder, prompt, 10) for prompt in prompts]
    assert {done.finish for done in found} == {"length"}


def test_stop_token_ends_its_row_only() -> None:
    decoder = build(small_config())
    prompts = _prompts(decoder, [3, 7])
    first, second = (_greedy_without_cache(decoder, prompt, 12) for prompt in prompts)
    stop = next(token for token in first if token not in second)
    found = generate_tokens(decoder, prompts, sampler=GREEDY, max_new_tokens=12, stop_ids={stop})
    assert found[0].tokens == first[: first.index(stop)]
    assert found[0].finish == "stop"
    assert found[1].tokens == second
    assert found[1].finish == "length"


def test_seed_decides() -> None:
    decoder = build(small_config())

    def sample(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        done = generate_tokens(
            decoder, _prompts(decoder, [3, 5]), sampler=Sampler(), max_new_tokens=8, generator=generator
        )
        return [row.tokens for row in done]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_callback_sees_each_token_as_it_comes() -> None:
    decoder = build(small_config())
    seen: list[tuple[int, int]] = []
    found = generate_tokens(
        decoder,
        _prompts(decoder, [3, 5]),
        sampler=GREEDY,
        max_new_tokens=4,
        on_token=lambda row, token: seen.append((row, token)),
    )
    assert seen == [(row, found[row].tokens[step]) for step in range(4) for row in range(2)]


def test_unusable_ids_are_never_drawn() -> None:
    decoder = build(small_config())
    generator = torch.Generator().manual_seed(0)
    (done,) = generate_tokens(
        decoder, [[1]], sampler=Sampler(temperature=5.0), max_new_tokens=60, usable_ids=7, generator=generator
    )
    assert set(done.tokens) <= set(range(7))


def test_ends_at_max_seq_len() -> None:
    decoder = build(small_config(max_seq_len=16))
    (done,) = generate_tokens(decoder, _prompts(decoder, [10]), sampler=GREEDY, max_new_tokens=100)
    assert len(done.tokens) == 6
    assert done.finish == "length"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompt to continue"),
        ([[1], []], "prompt 2 has no token"),
        ([[1] * 64], r"prompt 1 has 64 tokens and the model takes max_seq_len = 64.* 63 tokens or fewer"),
        ([[1, 97]], "prompt 1 holds token 97 and the model's vocab_size is 97"),
        ([[-1]], "prompt 1 holds token -1"),
    ],
)
def test_refused(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        generate_tokens(build(small_config()), prompts, sampler=GREEDY, max_new_tokens=4)
