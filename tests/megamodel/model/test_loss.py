"""The chunked loss against torch's cross-entropy, and how large a tensor it ever makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megamodel.model.decoder import Seams
from megamodel.model.loss import ChunkedTokenLoss
from tests.megamodel.small import build, random_tokens, small_config


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any tensor made while it is on has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def _inputs(tokens: int, d_model: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(tokens, d_model, generator=generator).to(dtype).requires_grad_()
    w_VD = torch.randn(vocab, d_model, generator=generator).requires_grad_()
    labels_T = torch.randint(0, vocab, (tokens,), generator=generator)
    labels_T[::4] = -100
    return x_TD, w_VD, labels_T


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
def test_value_and_gradients(chunk: int) -> None:
    x_TD, w_VD, labels_T = _inputs(33, 8, 50)
    expected = F.cross_entropy(x_TD @ w_VD.t(), labels_T, ignore_index=-100, reduction="sum")
    found = ChunkedTokenLoss(max_rows=chunk)(x_TD, w_VD, labels_T)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    for ours, oracle in zip(
        torch.autograd.grad(found * 0.37, [x_TD, w_VD]), torch.autograd.grad(expected * 0.37, [x_TD, w_VD])
    ):
        torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-5)


def test_ignored_tokens_get_no_gradient() -> None:
    x_TD, w_VD, labels_T = _inputs(12, 8, 50)
    ChunkedTokenLoss(max_rows=5)(x_TD, w_VD, labels_T).backward()
    assert x_TD.grad is not None
    assert (x_TD.grad.abs().sum(dim=1) > 0).tolist() == (labels_T >= 0).tolist()


def test_no_label_at_all() -> None:
    x_TD, w_VD, labels_T = _inputs(6, 8, 50)
    loss = ChunkedTokenLoss(max_rows=4)(x_TD, w_VD, torch.full_like(labels_T, -100))
    loss.backward()
    assert float(loss) == 0.0
    assert x_TD.grad is not None
    assert w_VD.grad is not None
    assert not x_TD.grad.any()
    assert not w_VD.grad.any()


@pytest.mark.parametrize("frozen", ["x", "w"])
def test_one_side_frozen(frozen: str) -> None:
    x_TD, w_VD, labels_T = _inputs(9, 8, 50)
    (x_TD if frozen == "x" else w_VD).requires_grad_(False)
    leaf = w_VD if frozen == "x" else x_TD
    expected = F.cross_entropy(x_TD @ w_VD.t(), labels_T, ignore_index=-100, reduction="sum")
    (oracle,) = torch.autograd.grad(expected, [leaf])
    (ours,) = torch.autograd.grad(ChunkedTokenLoss(max_rows=4)(x_TD, w_VD, labels_T), [leaf])
    torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    x_TD, w_VD, labels_T = _inputs(9, 8, 50)
    expected = F.cross_entropy(x_TD * 1e4 @ w_VD.t(), labels_T, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(ChunkedTokenLoss(max_rows=4)(x_TD * 1e4, w_VD, labels_T), expected)


def test_bf16_activations_with_fp32_weights() -> None:
    x_TD, w_VD, labels_T = _inputs(40, 16, 60, torch.bfloat16)
    expected = F.cross_entropy(x_TD.float() @ w_VD.t(), labels_T, ignore_index=-100, reduction="sum")
    found = ChunkedTokenLoss(max_rows=16)(x_TD, w_VD, labels_T)
    assert float((found - expected).abs() / expected) < 0.01
    for ours, oracle in zip(torch.autograd.grad(found, [x_TD, w_VD]), torch.autograd.grad(expected, [x_TD, w_VD])):
        assert ours.dtype == oracle.dtype
        assert float((ours - oracle).float().norm() / oracle.float().norm()) < 0.02


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_the_whole_batch_never_exist(tied: bool) -> None:
    config = small_config(vocab_size=4000, tie_embeddings=tied)
    decoder = build(config, seams=Seams(token_loss=ChunkedTokenLoss(max_rows=16)))
    tokens = random_tokens(config, 8, 64)
    with LargestTensor() as largest:
        decoder(tokens, labels_BS=tokens).token_loss_sum.backward()
    weight, chunk_logits, batch_logits = 4000 * config.d_model, 16 * 4000, tokens.numel() * 4000
    assert largest.elements <= max(weight, chunk_logits) < batch_logits / 10

    with LargestTensor() as plain:
        F.cross_entropy(decoder(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert plain.elements >= batch_logits


def test_nothing_is_kept_for_the_backward_but_gradients() -> None:
    x_TD, w_VD, labels_T = _inputs(64, 8, 500)
    kept: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        ChunkedTokenLoss(max_rows=16)(x_TD, w_VD, labels_T)
    assert sum(tensor.numel() for tensor in kept) == x_TD.numel() + w_VD.numel()


def test_without_gradients_none_are_made() -> None:
    x_TD, w_VD, labels_T = _inputs(64, 8, 500)
    with torch.no_grad(), LargestTensor() as largest:
        ChunkedTokenLoss(max_rows=2)(x_TD, w_VD, labels_T)
    assert largest.elements <= w_VD.numel()
