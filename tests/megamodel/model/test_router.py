"""The router's choice, gates and statistics against formulas written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megamodel.model.config import MoEConfig
from megamodel.model.moe import Router
from megamodel.model.seams import WholeSequences
from tests.megamodel.small import MOE, build, random_tokens, small_config

D_MODEL, NUM_EXPERTS, BATCH, SEQ = 8, 6, 2, 5


def _router(**fields: Any) -> Router:
    config = MoEConfig(**{"num_experts": NUM_EXPERTS, "top_k": 2, "d_ff": 4, **fields})
    torch.manual_seed(0)
    router = Router(D_MODEL, config, WholeSequences())
    torch.nn.init.normal_(router.weight)
    if router.balance_bias is not None:
        router.balance_bias.zero_()
    return router


def _inputs() -> Tensor:
    return torch.randn(BATCH, SEQ, D_MODEL, generator=torch.Generator().manual_seed(1))


def _affinity(router: Router, x_BSD: Tensor) -> Tensor:
    logits_BSE = x_BSD @ router.weight.t()
    if router.config.router_score == "sigmoid":
        return 1 / (1 + torch.exp(-logits_BSE))
    return torch.exp(logits_BSE) / torch.exp(logits_BSE).sum(-1, keepdim=True)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_gates(score: str, normalize: bool, scale: float) -> None:
    router = _router(router_score=score, normalize_gates=normalize, gate_scale=scale)
    x_BSD = _inputs()
    routing, stats = router(x_BSD, None)
    assert stats is None
    values, chosen = _affinity(router, x_BSD).flatten(0, 1).topk(2)
    assert torch.equal(routing.experts_TK, chosen)
    expected = values / values.sum(-1, keepdim=True) if normalize else values
    torch.testing.assert_close(routing.gates_TK, expected * scale)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_bias_moves_the_choice_and_never_the_gates(score: str) -> None:
    router = _router(balance="bias", router_score=score, normalize_gates=False)
    x_BSD = _inputs()
    assert router.balance_bias is not None
    router.balance_bias[3] = 100.0
    routing, _ = router(x_BSD, None)
    assert bool((routing.experts_TK == 3).any(dim=-1).all())
    affinity_TE = _affinity(router, x_BSD).flatten(0, 1)
    torch.testing.assert_close(routing.gates_TK, affinity_TE.gather(1, routing.experts_TK))


def test_bias_gets_no_gradient_and_is_saved() -> None:
    router = _router(balance="bias")
    assert "balance_bias" not in dict(router.named_parameters())
    assert "balance_bias" in router.state_dict()
    assert "balance_bias" not in _router(balance="aux_loss").state_dict()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_statistics_by_their_formulas(score: str) -> None:
    router = _router(router_score=score)
    x_BSD, weight_B = _inputs(), torch.tensor([5.0, 2.0])
    routing, stats = router(x_BSD, weight_B)
    assert stats is not None
    affinity_BSE = _affinity(router, x_BSD)
    probability_BSE = affinity_BSE / affinity_BSE.sum(-1, keepdim=True)
    chosen_BSK = routing.experts_TK.view(BATCH, SEQ, 2)
    logits_BSE = x_BSD @ router.weight.t()
    balance = z = 0.0
    for b in range(BATCH):
        for expert in range(NUM_EXPERTS):
            # DeepSeek-V3, eq. 17-20: f_i = E / (K T) * times chosen, P_i = mean share of the affinity.
            share = float((chosen_BSK[b] == expert).sum()) * NUM_EXPERTS / (2 * SEQ)
            balance += float(weight_B[b]) * share * float(probability_BSE[b, :, expert].mean())
        z += float(weight_B[b]) * float(torch.log(torch.exp(logits_BSE[b]).sum(-1)).square().mean())
    assert float(stats.balance_sum) == pytest.approx(balance, rel=1e-5)
    assert float(stats.z_sum) == pytest.approx(z, rel=1e-5)
    entropy = -(probability_BSE * torch.log(probability_BSE)).sum()
    assert float(stats.entropy_sum) == pytest.approx(float(entropy), rel=1e-5)
    assert stats.counts_E.tolist() == [int((chosen_BSK == expert).sum()) for expert in range(NUM_EXPERTS)]


def test_balanced_routing_has_balance_loss_one() -> None:
    router = _router(num_experts=4, top_k=1)
    router.weight.data.copy_(torch.eye(4, D_MODEL) * 50)
    x_BSD = torch.eye(4, D_MODEL)[None]
    _, even = router(x_BSD, torch.ones(1))
    _, skewed = router(x_BSD[:, [0, 0, 0, 0]], torch.ones(1))
    assert even is not None
    assert skewed is not None
    assert float(even.balance_sum) == pytest.approx(1.0, rel=1e-4)
    assert float(skewed.balance_sum) == pytest.approx(4.0, rel=1e-4)


def test_router_losses_are_weighted_and_added() -> None:
    moe = {**MOE, "aux_loss_weight": 0.3, "z_loss_weight": 0.7}
    config = small_config(moe=moe)
    tokens = random_tokens(config, 2, 6)
    terms = build(config)(tokens, labels_BS=tokens)
    expected = sum(0.3 * stats.balance_sum + 0.7 * stats.z_sum for stats in terms.router_stats)
    torch.testing.assert_close(terms.router_loss_sum, expected)
    assert len(terms.router_stats) == 2

    without = build(small_config(moe={**moe, "balance": "none", "z_loss_weight": 0.0}))(tokens, labels_BS=tokens)
    assert float(without.router_loss_sum) == 0.0


def test_router_loss_of_rows_adds_up_by_their_labels() -> None:
    """The sum over a batch is the sum over its rows: what makes it the same under any split among ranks."""
    config = small_config(moe={**MOE, "z_loss_weight": 0.1})
    decoder = build(config)
    tokens = random_tokens(config, 3, 6)
    labels = tokens.clone()
    labels[0, 2:] = -100
    labels[2] = -100
    whole = decoder(tokens, labels_BS=labels).router_loss_sum
    rows = sum(decoder(tokens[i : i + 1], labels_BS=labels[i : i + 1]).router_loss_sum for i in range(3))
    torch.testing.assert_close(whole, rows)
    assert float(decoder(tokens[2:], labels_BS=labels[2:]).router_loss_sum) == 0.0


def test_update_of_the_balance_bias() -> None:
    config = small_config(moe={**MOE, "balance": "bias", "bias_update_rate": 0.25})
    decoder = build(config)
    decoder.update_balance_bias(torch.tensor([[8, 4, 0, 4], [1, 1, 1, 1]]))
    decoder.update_balance_bias(torch.tensor([[8, 0, 4, 4], [1, 1, 1, 1]]))
    biases = [block.moe.router.balance_bias.tolist() for block in decoder.layers.values()]
    assert biases == [[-0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_bias_updates_even_out_the_load() -> None:
    config = small_config(num_layers=1, moe={**MOE, "balance": "bias", "bias_update_rate": 0.02})
    decoder = build(config, seed=2)
    tokens = random_tokens(config, 8, 32)

    def spread() -> float:
        counts = decoder(tokens, labels_BS=tokens).router_stats[0].counts_E.float()
        decoder.update_balance_bias(counts[None])
        return float(counts.max() / counts.mean())

    first = spread()
    for _ in range(40):
        last = spread()
    assert last < 1.15 < first
