"""What may be drawn, with which probability."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megamodel.errors import ModelError
from megamodel.generate.sampler import Sampler

PROBABILITIES = [0.05, 0.4, 0.25, 0.2, 0.1]


def _logits() -> Tensor:
    return torch.tensor([PROBABILITIES]).log() + 3.0


def _by_token(sampler: Sampler) -> list[float]:
    probabilities, tokens = sampler.probabilities(_logits())
    return torch.zeros(5).scatter(0, tokens[0], probabilities[0]).tolist()


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (Sampler(), PROBABILITIES),
        (Sampler(top_k=2), [0, 0.4 / 0.65, 0.25 / 0.65, 0, 0]),
        (Sampler(top_k=99), PROBABILITIES),
        (Sampler(top_p=0.6), [0, 0.4 / 0.65, 0.25 / 0.65, 0, 0]),
        (Sampler(top_p=0.66), [0, 0.4 / 0.85, 0.25 / 0.85, 0.2 / 0.85, 0]),
        (Sampler(top_p=0.01), [0, 1, 0, 0, 0]),
        # Top-p counts what top-k leaves: 0.4 / 0.65 alone reaches 0.6.
        (Sampler(top_k=2, top_p=0.6), [0, 1, 0, 0, 0]),
    ],
)
def test_probabilities(sampler: Sampler, expected: list[float]) -> None:
    assert _by_token(sampler) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature(temperature: float) -> None:
    powers = [p ** (1 / temperature) for p in PROBABILITIES]
    expected = [p / sum(powers) for p in powers]
    assert _by_token(Sampler(temperature=temperature)) == pytest.approx(expected, abs=1e-6)


def test_ties_leave_exactly_top_k() -> None:
    probabilities, _ = Sampler(top_k=2).probabilities(torch.zeros(1, 5))
    assert probabilities.tolist() == [[0.5, 0.5, 0, 0, 0]]


def test_draws_follow_the_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = Sampler()(_logits().expand(20_000, -1), generator)
    shares = torch.bincount(drawn, minlength=5) / 20_000
    assert shares.tolist() == pytest.approx(PROBABILITIES, abs=0.015)


def test_same_seed_same_draws() -> None:
    logits = torch.randn(50, 20)
    first, second, other = (Sampler()(logits, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_greedy_needs_no_generator() -> None:
    logits = torch.randn(7, 20)
    assert torch.equal(Sampler(temperature=0)(logits, None), logits.argmax(-1))


def test_tiny_temperature_is_nearly_greedy() -> None:
    logits = torch.randn(7, 20) * 100
    assert torch.equal(Sampler(temperature=1e-6)(logits, None), logits.argmax(-1))


def test_ruled_out_tokens_are_never_drawn() -> None:
    logits = _logits()
    logits[0, 1] = -math.inf
    drawn = Sampler()(logits.expand(500, -1), torch.Generator().manual_seed(0))
    assert not (drawn == 1).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_logits_are_refused(bad: float, temperature: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 2] = bad
    with pytest.raises(ModelError, match="logits are NaN or infinite"):
        Sampler(temperature=temperature)(logits, None)
