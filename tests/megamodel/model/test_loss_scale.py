"""The factor one over the number of tokens must not be rounded to the dtype of the activations."""

from __future__ import annotations

import pytest
import torch

from megamodel.model.loss import ChunkedTokenLoss, ChunkTerms, chunk_terms


def test_in_bf16_the_gradients_scale_exactly_with_the_number_of_tokens() -> None:
    x = torch.randn(40, 16).bfloat16().requires_grad_()
    w = torch.randn(50, 16).requires_grad_()
    labels = torch.randint(0, 50, (40,))
    plain = torch.autograd.grad(ChunkedTokenLoss()(x, w, labels), (x, w))
    # 1 / 4000 is 0.06% off in bfloat16.
    scaled = torch.autograd.grad(ChunkedTokenLoss()(x, w, labels) / 4000, (x, w))
    for whole, part in zip(plain, scaled, strict=True):
        ratio = float((whole.double() * part.double()).sum() / whole.double().square().sum())
        assert ratio * 4000 == pytest.approx(1.0, abs=2e-4)


def test_a_larger_vocabulary_takes_fewer_rows_at_once() -> None:
    rows: list[int] = []

    def counted(logits_CV: torch.Tensor, labels_C: torch.Tensor) -> ChunkTerms:
        rows.append(logits_CV.shape[0])
        return chunk_terms(logits_CV, labels_C)

    ChunkedTokenLoss(max_logits=1000, terms=counted)(torch.randn(24, 4), torch.randn(100, 4), torch.zeros(24).long())
    assert rows == [10, 10, 4]
