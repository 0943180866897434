"""Logits with a cache equal those without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamodel.errors import ModelError
from megamodel.generate.cache import PreallocatedCache
from megamodel.model.config import ModelConfig
from tests.megamodel.small import MLA, MOE, build, random_tokens, small_config

KINDS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "qk_norm_tied": {"qk_norm": True, "tie_embeddings": True},
    "latent": {"mla": MLA},
    "moe": {"moe": {**MOE, "first_layer": 1}, "qk_norm": True},
    "latent_sigmoid_moe": {
        "mla": MLA,
        "moe": {**MOE, "router_score": "sigmoid", "balance": "bias", "num_shared_experts": 1, "gate_scale": 2.5},
    },
}


def _cache(config: ModelConfig, batch: int, capacity: int) -> PreallocatedCache:
    return PreallocatedCache(
        config, batch_size=batch, capacity=capacity, dtype=torch.float32, device=torch.device("cpu")
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [[12], [7, 1, 1, 1, 1, 1], [1] * 12, [5, 4, 3]])
@torch.no_grad()
def test_cached_and_uncached_logits_agree(kind: str, steps: list[int]) -> None:
    config = small_config(**KINDS[kind])
    decoder = build(config)
    tokens = random_tokens(config, 2, 12)
    cache = _cache(config, 2, 12)
    found, at = [], 0
    for step in steps:
        assert cache.length == at
        found.append(decoder(tokens[:, at : at + step], cache=cache))
        at += step
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(found, dim=1), decoder(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_documents_with_a_cache(kind: str) -> None:
    config = small_config(**KINDS[kind])
    decoder = build(config)
    tokens = random_tokens(config, 2, 10)
    documents = torch.tensor([[0] * 4 + [1] * 6, [0] * 2 + [1] * 8])
    cache = _cache(config, 2, 10)
    found = [decoder(tokens[:, :6], document_ids_BS=documents[:, :6], cache=cache)]
    for at in range(6, 10):
        found.append(decoder(tokens[:, at : at + 1], document_ids_BS=documents[:, : at + 1], cache=cache))
    expected = decoder(tokens, document_ids_BS=documents)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_memory_is_taken_once() -> None:
    config = small_config()
    cache = _cache(config, 1, 6)
    decoder = build(config)
    with torch.no_grad():
        decoder(random_tokens(config, 1, 3), cache=cache)
        before = cache.update(0, torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))[0].data_ptr()
        after = cache.update(0, torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 2, 8))[0].data_ptr()
    assert before == after
    assert cache.length == 3  # only the last layer's share counts


@torch.no_grad()
def test_more_than_it_holds_is_refused() -> None:
    config = small_config()
    cache = _cache(config, 1, 4)
    decoder = build(config)
    decoder(random_tokens(config, 1, 3), cache=cache)
    with pytest.raises(ModelError, match="holds 4 tokens and 5 are needed"):
        decoder(random_tokens(config, 1, 2), cache=cache)
