"""Dropless dispatch against a loop that sends each token to each of its experts in turn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megamodel.model.config import MoEConfig
from megamodel.model.moe import Experts, MoE, Routing
from megamodel.model.seams import InOrder, LocalExchange, WholeSequences

D_MODEL, NUM_EXPERTS, D_FF, TOKENS = 8, 5, 16, 17


def _experts(top_k: int) -> Experts:
    torch.manual_seed(top_k)
    experts = Experts(D_MODEL, MoEConfig(num_experts=NUM_EXPERTS, top_k=top_k, d_ff=D_FF), LocalExchange())
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


def _loop(experts: Experts, x_TD: Tensor, routing: Routing) -> Tensor:
    rows = []
    for x_D, chosen_K, gates_K in zip(x_TD, routing.experts_TK, routing.gates_TK, strict=True):
        y_D = torch.zeros_like(x_D)
        for expert, gate in zip(chosen_K.tolist(), gates_K, strict=True):
            hidden_F = F.silu(x_D @ experts.w_gate_EDF[expert]) * (x_D @ experts.w_up_EDF[expert])
            y_D = y_D + gate * (hidden_F @ experts.w_down_EFD[expert])
        rows.append(y_D)
    return torch.stack(rows)


def _compare(experts: Experts, chosen_TK: Tensor) -> None:
    gates_TK = torch.rand(chosen_TK.shape, requires_grad=True)
    x_TD = torch.randn(chosen_TK.shape[0], D_MODEL, requires_grad=True)
    weight_TD = torch.randn_like(x_TD)
    leaves = [x_TD, gates_TK, *experts.parameters()]
    routing = Routing(chosen_TK, gates_TK)
    expected_TD, found_TD = _loop(experts, x_TD, routing), experts(x_TD, routing)
    torch.testing.assert_close(found_TD, expected_TD, atol=1e-5, rtol=1e-5)
    expected = torch.autograd.grad((expected_TD * weight_TD).sum(), leaves)
    found = torch.autograd.grad((found_TD * weight_TD).sum(), leaves)
    for ours, oracle in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, oracle, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("top_k", range(1, NUM_EXPERTS + 1))
def test_dispatch_equals_the_loop(top_k: int) -> None:
    experts = _experts(top_k)
    _compare(experts, torch.rand(TOKENS, NUM_EXPERTS).topk(top_k).indices)


@pytest.mark.parametrize("used", [(0,), (4,), (1, 3)])
def test_experts_without_a_token(used: tuple[int, ...]) -> None:
    experts = _experts(1)
    _compare(experts, torch.tensor(used)[torch.randint(0, len(used), (TOKENS, 1))])


def test_idle_expert_gets_a_zero_gradient() -> None:
    experts = _experts(1)
    x_TD = torch.randn(TOKENS, D_MODEL)
    routing = Routing(torch.full((TOKENS, 1), 2), torch.ones(TOKENS, 1))
    (experts(x_TD, routing) * torch.randn(TOKENS, D_MODEL)).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        busy_E = parameter.grad.flatten(1).abs().sum(dim=1) > 0
        assert busy_E.tolist() == [False, False, True, False, False]


def test_no_token_is_dropped_when_all_choose_one_expert() -> None:
    experts = _experts(1)
    x_TD = torch.randn(TOKENS, D_MODEL)
    routing = Routing(torch.zeros(TOKENS, 1, dtype=torch.int64), torch.ones(TOKENS, 1))
    torch.testing.assert_close(experts(x_TD, routing), _loop(experts, x_TD, routing), atol=1e-5, rtol=1e-5)


def test_shared_experts_are_added_to_every_token() -> None:
    torch.manual_seed(0)
    config = MoEConfig(num_experts=4, top_k=2, d_ff=D_FF, num_shared_experts=3)
    moe = MoE(D_MODEL, config, LocalExchange(), WholeSequences(), InOrder())
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    x_BSD = torch.randn(2, 3, D_MODEL)
    routing, _ = moe.router(x_BSD, None)
    assert moe.shared is not None
    assert moe.shared.gate_proj.weight.shape == (3 * D_FF, D_MODEL)
    routed_BSD = moe.experts(x_BSD.flatten(0, 1), routing).view_as(x_BSD)
    torch.testing.assert_close(moe(x_BSD, None)[0], routed_BSD + moe.shared(x_BSD))


def test_gradient_reaches_the_router_through_the_gates() -> None:
    torch.manual_seed(0)
    moe = MoE(D_MODEL, MoEConfig(num_experts=4, top_k=2, d_ff=D_FF), LocalExchange(), WholeSequences(), InOrder())
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    x_BSD = torch.randn(2, 3, D_MODEL)
    weight_BSD = torch.randn_like(x_BSD)
    (found,) = torch.autograd.grad((moe(x_BSD, None)[0] * weight_BSD).sum(), [moe.router.weight])
    routing, _ = moe.router(x_BSD, None)
    expected_TD = _loop(moe.experts, x_BSD.flatten(0, 1), routing)
    (expected,) = torch.autograd.grad((expected_TD * weight_BSD.flatten(0, 1)).sum(), [moe.router.weight])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert found.abs().sum() > 0


def test_bf16_follows_fp32() -> None:
    experts = _experts(2)
    x_TD = torch.randn(TOKENS, D_MODEL)
    routing = Routing(torch.rand(TOKENS, NUM_EXPERTS).topk(2).indices, torch.rand(TOKENS, 2))
    low_TD = experts(x_TD.bfloat16(), routing)
    assert low_TD.dtype == torch.bfloat16
    exact_TD = experts(x_TD, routing)
    assert (low_TD.float() - exact_TD).norm() / exact_TD.norm() < 0.02
