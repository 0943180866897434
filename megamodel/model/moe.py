"""Mixture of experts: a top-k router, dropless dispatch by sorting, and grouped matrix products.

Shape suffixes: B batch, S sequence, T tokens (B * S), R routed rows (T * top_k), K top_k, E experts, D d_model, F expert width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamodel.model.config import MoEConfig
from megamodel.model.grouped_mm import grouped_mm
from megamodel.model.layers import SwiGLU
from megamodel.model.seams import BesideRoutedExperts, SequenceShare, TokenExchange


class RouterStats(NamedTuple):
    """What one router did to one batch; every figure is a sum, so that batches and ranks add up."""

    counts_E: Tensor
    """Rows sent to each expert (int64)."""
    entropy_sum: Tensor
    """Entropy of the routing distribution, in nats, summed over tokens."""
    balance_sum: Tensor
    """Balance loss of each sequence (of the tokens here) times its weight, summed."""
    z_sum: Tensor
    """Mean squared log-sum-exp of each sequence's logits times its weight, summed."""


class Routing(NamedTuple):
    """The experts of each token, and the weight of each in the token's output."""

    experts_TK: Tensor
    gates_TK: Tensor


class Router(nn.Module):
    """Top-k choice of experts (Shazeer et al. 2017), in float32 whatever the dtype of the activations."""

    balance_bias: Tensor | None

    def __init__(self, d_model: int, config: MoEConfig, sequence: SequenceShare) -> None:
        super().__init__()
        self.config = config
        self.sequence = sequence
        self.weight = nn.Parameter(torch.empty(config.num_experts, d_model))
        # DeepSeek-V3, eq. 16: added to the affinities for choosing only, never to the gates, so no gradient reaches it.
        self.register_buffer("balance_bias", torch.empty(config.num_experts) if config.balance == "bias" else None)

    def forward(self, x_BSD: Tensor, row_weight_B: Tensor | None) -> tuple[Routing, RouterStats | None]:
        """Routes each token; statistics where `row_weight_B` (how much each sequence counts in the losses) is given."""
        logits_BSE = F.linear(x_BSD.float(), self.weight.float())
        if self.config.router_score == "softmax":
            affinity_BSE = logits_BSE.softmax(dim=-1)
        else:
            affinity_BSE = logits_BSE.sigmoid()
        choice_BSE = affinity_BSE if self.balance_bias is None else affinity_BSE + self.balance_bias
        experts_BSK = choice_BSE.detach().topk(self.config.top_k, dim=-1).indices
        gates_BSK = affinity_BSE.gather(-1, experts_BSK)
        if self.config.normalize_gates:
            gates_BSK = gates_BSK / gates_BSK.sum(dim=-1, keepdim=True)
        routing = Routing(experts_BSK.flatten(0, 1), (gates_BSK * self.config.gate_scale).flatten(0, 1))
        if row_weight_B is None:
            return routing, None
        return routing, self._stats(logits_BSE, affinity_BSE, experts_BSK, row_weight_B)

    def _stats(
        self, logits_BSE: Tensor, affinity_BSE: Tensor, experts_BSK: Tensor, row_weight_B: Tensor
    ) -> RouterStats:
        """Balance loss per sequence (DeepSeek-V3, eq. 17-20), so that neither micro batches nor ranks change it.

        Of a sequence that is spread over processes each has its summand: given the load, which carries no gradient, the
        loss is linear in the tokens' probabilities. So the load is all that is exchanged.
        """
        batch, seq, num_experts = logits_BSE.shape
        seq *= self.sequence.size
        counts_BE = torch.zeros(batch, num_experts, dtype=torch.int64, device=logits_BSE.device)
        chosen = experts_BSK.flatten(1)
        counts_BE = counts_BE.scatter_add(1, chosen, torch.ones_like(chosen))
        probability_BSE = affinity_BSE / affinity_BSE.sum(dim=-1, keepdim=True)
        load_BE = self.sequence.sum(counts_BE) * (num_experts / (self.config.top_k * seq))
        balance_B = (load_BE * (probability_BSE.sum(dim=1) / seq)).sum(dim=-1)
        z_B = logits_BSE.logsumexp(dim=-1).square().sum(dim=1) / seq
        entropy = -(probability_BSE * probability_BSE.clamp_min(1e-20).log()).sum()
        return RouterStats(
            counts_E=counts_BE.sum(dim=0),
            entropy_sum=entropy.detach(),
            balance_sum=(balance_B * row_weight_B).sum(),
            z_sum=(z_B * row_weight_B).sum(),
        )


class _SortRows(torch.autograd.Function):
    """Row r of the result is token order_R[r] // K. Its backward gathers by the inverse: no atomic adds, so it is exact."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.top_k = top_k
        return x_TD[order_R // top_k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return grads[0][inverse_R].unflatten(0, (-1, ctx.top_k)).sum(dim=1), None, None, None


class _UnsortRows(torch.autograd.Function):
    """Undoes the sort: row r of the result is row inverse_R[r]; the backward gathers by the order."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(order_R)
        return y_RD[inverse_R]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order_R,) = ctx.saved_tensors
        return grads[0][order_R], None, None


class Experts(nn.Module):
    """Routed SwiGLU experts, stacked: each is w_down(silu(w_gate x) * w_up x)."""

    def __init__(self, d_model: int, config: MoEConfig, exchange: TokenExchange) -> None:
        super().__init__()
        self.exchange = exchange
        self.num_experts = config.num_experts
        self.w_gate_EDF = nn.Parameter(torch.empty(config.num_experts, d_model, config.d_ff))
        self.w_up_EDF = nn.Parameter(torch.empty(config.num_experts, d_model, config.d_ff))
        self.w_down_EFD = nn.Parameter(torch.empty(config.num_experts, config.d_ff, d_model))

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Every token through each of its experts, weighted by its gates: (T, D) -> (T, D). No token is dropped."""
        top_k = routing.experts_TK.shape[1]
        experts_R = routing.experts_TK.flatten()
        order_R = experts_R.argsort(stable=True)
        inverse_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(order_R.numel(), device=order_R.device))
        counts_E = torch.zeros(self.num_experts, dtype=torch.int64, device=x_TD.device)
        counts_E = counts_E.scatter_add(0, experts_R, torch.ones_like(experts_R))
        x_RD, counts_local_E, handle = self.exchange.dispatch(
            _SortRows.apply(x_TD, order_R, inverse_R, top_k), counts_E
        )
        y_RD = self.exchange.combine(self._grouped_swiglu(x_RD, counts_local_E), handle)
        y_TKD = _UnsortRows.apply(y_RD, order_R, inverse_R).unflatten(0, (-1, top_k))
        return (y_TKD * routing.gates_TK.to(y_TKD.dtype).unsqueeze(-1)).sum(dim=1)

    def _grouped_swiglu(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        ends_E = counts_E.cumsum(0).to(torch.int32)
        gate_RF = grouped_mm(x_RD, self.w_gate_EDF.to(x_RD.dtype), ends_E)
        up_RF = grouped_mm(x_RD, self.w_up_EDF.to(x_RD.dtype), ends_E)
        return grouped_mm(F.silu(gate_RF) * up_RF, self.w_down_EFD.to(x_RD.dtype), ends_E)


class MoE(nn.Module):
    """Router, routed experts and, where configured, one SwiGLU that every token passes besides."""

    def __init__(
        self,
        d_model: int,
        config: MoEConfig,
        exchange: TokenExchange,
        sequence: SequenceShare,
        beside: BesideRoutedExperts,
    ) -> None:
        super().__init__()
        self.router = Router(d_model, config, sequence)
        self.experts = Experts(d_model, config, exchange)
        self.beside = beside
        self.shared = SwiGLU(d_model, config.num_shared_experts * config.d_ff) if config.num_shared_experts else None

    def forward(self, x_BSD: Tensor, row_weight_B: Tensor | None) -> tuple[Tensor, RouterStats | None]:
        """(B, S, D) -> (B, S, D), and the router's statistics where weights of the sequences are given."""
        routing, stats = self.router(x_BSD, row_weight_B)
        shared = None if self.shared is None else self.beside.run(self.shared, x_BSD)
        y_BSD = self.routed(x_BSD, routing)
        if shared is not None:
            y_BSD = y_BSD + self.beside.join(shared)
        return y_BSD, stats

    def routed(self, x_BSD: Tensor, routing: Routing) -> Tensor:
        """The routed experts alone: (B, S, D) -> (B, S, D)."""
        return self.experts(x_BSD.flatten(0, 1), routing).view_as(x_BSD)
