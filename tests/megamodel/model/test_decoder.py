"""The decoder as a whole: what it returns, and that sums add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.megamodel.small import MLA, MOE, build, random_tokens, small_config


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": True}, {"moe": MOE}, {"mla": MLA}])
def test_logits_and_loss_agree(fields: dict[str, Any]) -> None:
    config = small_config(**fields)
    decoder = build(config)
    tokens = random_tokens(config, 3, 9)
    labels = random_tokens(config, 3, 9, seed=1)
    labels[:, ::3] = -100
    logits = decoder(tokens)
    assert logits.shape == (3, 9, config.vocab_size)
    assert logits.dtype == torch.float32
    terms = decoder(tokens, labels_BS=labels)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(terms.token_loss_sum, expected, rtol=1e-5, atol=1e-4)
    assert len(terms.router_stats) == config.num_moe_layers


def test_gradients_of_rows_add_up() -> None:
    """Losses are sums, so micro-batches of any size give the gradient of the batch."""
    config = small_config(moe={**MOE, "z_loss_weight": 0.1}, tie_embeddings=True, qk_norm=True)
    decoder = build(config)
    tokens, labels = random_tokens(config, 4, 9), random_tokens(config, 4, 9, seed=1)
    labels[1, 3:] = -100

    def backward(rows: slice) -> None:
        terms = decoder(tokens[rows], labels_BS=labels[rows])
        (terms.token_loss_sum + terms.router_loss_sum).backward()

    backward(slice(0, 4))
    whole = {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}
    decoder.zero_grad()
    for start, stop in ((0, 1), (1, 2), (2, 4)):
        backward(slice(start, stop))
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-4, msg=name)


def test_tied_embeddings_are_one_matrix() -> None:
    tied = build(small_config(tie_embeddings=True))
    assert "lm_head.weight" not in tied.state_dict()
    assert tied.output_weight is tied.embedding.weight
    untied = build(small_config())
    untied.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.embedding.weight})
    tokens = random_tokens(tied.config, 1, 5)
    assert torch.equal(tied(tokens), untied(tokens))


def test_bf16_compute_keeps_fp32_weights_and_logits() -> None:
    config = small_config(moe=MOE, qk_norm=True, init_std=0.05)
    decoder = build(config)
    tokens = random_tokens(config, 2, 9)
    exact = decoder(tokens, labels_BS=tokens)
    decoder.compute_dtype = torch.bfloat16
    low = decoder(tokens, labels_BS=tokens)
    assert decoder(tokens).dtype == torch.float32
    assert low.token_loss_sum.dtype == torch.float32
    torch.testing.assert_close(low.token_loss_sum, exact.token_loss_sum, rtol=0.01, atol=0)
    low.token_loss_sum.backward()
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in decoder.parameters())


def test_a_decoder_learns_to_copy() -> None:
    """Everything together: an induction task that only attention over earlier tokens can solve."""
    config = small_config(vocab_size=16, num_layers=2, moe=MOE, qk_norm=True, init_std=0.05)
    decoder = build(config)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        half = torch.randint(0, 16, (16, 8), generator=generator)
        tokens = torch.cat((half, half), dim=1)
        labels = torch.full_like(tokens, -100)
        labels[:, 8:-1] = tokens[:, 9:]
        terms = decoder(tokens, labels_BS=labels)
        loss = (terms.token_loss_sum + terms.router_loss_sum) / (labels >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(terms.token_loss_sum.detach() / (labels >= 0).sum()) < 0.5
