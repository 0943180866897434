"""Explicit scores against torch's fused attention: values and gradients, with and without documents and a cache."""

from __future__ import annotations

import pytest
import torch

from megamodel.model.explicit_attention import ExplicitScores
from megamodel.model.seams import ScaledDotProduct


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("num_queries", [1, 5, 12])
def test_explicit_scores_equal_sdpa(num_kv_heads: int, documents: bool, num_queries: int) -> None:
    keys = 12
    q = torch.randn(3, 4, num_queries, 8, requires_grad=True)
    k, v = (torch.randn(3, num_kv_heads, keys, width, requires_grad=True) for width in (8, 6))
    ids = torch.tensor([[0] * 12, [0] * 5 + [1] * 7, [0, 1, 1, 2] * 3]).sort(dim=1).values if documents else None
    results = []
    for core in (ExplicitScores(), ScaledDotProduct()):
        out = core(q, k, v, core.prepare(ids, num_queries, keys, q.device))
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
