"""The decoder: embedding, pre-norm blocks, final norm, output matrix.

Shape suffixes: B batch, S sequence, D d_model, V vocabulary, L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamodel.model.attention import GroupedQueryAttention, MultiHeadLatentAttention
from megamodel.model.config import ModelConfig
from megamodel.model.layers import Linear, RMSNorm, SwiGLU
from megamodel.model.loss import ChunkedTokenLoss
from megamodel.model.moe import MoE, RouterStats
from megamodel.model.rope import rotary_table
from megamodel.model.seams import (
    AttentionCore,
    KeyValueCache,
    LocalExchange,
    ScaledDotProduct,
    TokenExchange,
    TokenLoss,
)


class LossTerms(NamedTuple):
    """What a forward pass with labels gives: sums over tokens, so that batches, micro-batches and ranks add up."""

    token_loss_sum: Tensor
    """Cross-entropy in nats, summed over tokens with a label."""
    router_loss_sum: Tensor
    """Weighted balance and z-losses of all routers, summed over the same tokens; zero without MoE."""
    router_stats: list[RouterStats]
    """One for each MoE layer."""


@dataclass(frozen=True, kw_only=True)
class Seams:
    """What plugs into a decoder; the defaults work in one process."""

    attention_core: AttentionCore = field(default_factory=ScaledDotProduct)
    token_exchange: TokenExchange = field(default_factory=LocalExchange)
    token_loss: TokenLoss = field(default_factory=ChunkedTokenLoss)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), where the feed-forward is dense or MoE."""

    def __init__(self, config: ModelConfig, layer: int, seams: Seams) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention: nn.Module
        if config.mla is not None:
            self.attention = MultiHeadLatentAttention(config, config.mla, seams.attention_core)
        else:
            self.attention = GroupedQueryAttention(config, seams.attention_core)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp: SwiGLU | None = None
        self.moe: MoE | None = None
        if config.moe is not None and config.is_moe_layer(layer):
            self.moe = MoE(config.d_model, config.moe, seams.token_exchange)
        else:
            self.mlp = SwiGLU(config.d_model, config.d_ff)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: Tensor,
        prepared: Any,
        row_weight_B: Tensor | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> tuple[Tensor, RouterStats | None]:
        """(B, S, D) -> (B, S, D) and, for an MoE block with weights of the sequences, the router's statistics."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotary, prepared, cache, layer)
        normed_BSD = self.mlp_norm(x_BSD)
        if self.moe is not None:
            y_BSD, stats = self.moe(normed_BSD, row_weight_B)
            return x_BSD + y_BSD, stats
        assert self.mlp is not None
        return x_BSD + self.mlp(normed_BSD), None


class Decoder(nn.Module):
    """A decoder-only language model. `compute_dtype` is that of activations and products; weights keep their own."""

    def __init__(self, config: ModelConfig, seams: Seams | None = None) -> None:
        super().__init__()
        seams = seams or Seams()
        self.config = config
        self.compute_dtype = torch.float32
        self.attention_core = seams.attention_core
        self.token_loss = seams.token_loss
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, layer, seams) for layer in range(config.num_layers))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size)

    @property
    def output_weight(self) -> Tensor:
        """The (V, D) matrix that turns hidden states into logits."""
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Any:
        """Logits (B, S, V) in float32 where no labels are given, `LossTerms` where they are.

        tokens_BS: int64 ids. labels_BS: the id that should follow each token, negative where none counts.
        document_ids_BS: attention stays within equal ids; with a cache they cover the cached tokens too.
        cache: tokens_BS follow the tokens that it holds.
        """
        row_weight_B = None if labels_BS is None else (labels_BS >= 0).sum(dim=1).float()
        x_BSD, stats = self._hidden(tokens_BS, document_ids_BS, row_weight_B, cache)
        if labels_BS is None:
            return F.linear(x_BSD, self.output_weight.to(x_BSD.dtype)).float()
        token_loss = self.token_loss(x_BSD.flatten(0, 1), self.output_weight, labels_BS.flatten())
        return LossTerms(token_loss, self._router_loss(stats, token_loss), stats)

    def _hidden(
        self,
        tokens_BS: Tensor,
        document_ids_BS: Tensor | None,
        row_weight_B: Tensor | None,
        cache: KeyValueCache | None,
    ) -> tuple[Tensor, list[RouterStats]]:
        seq = tokens_BS.shape[1]
        past = 0 if cache is None else cache.length
        mla = self.config.mla
        rotary_dim = self.config.head_dim if mla is None else mla.qk_rope_head_dim
        rotary = rotary_table(past, seq, rotary_dim, self.config.rope_theta, tokens_BS.device)
        prepared = self.attention_core.prepare(document_ids_BS, seq, past + seq, tokens_BS.device)
        x_BSD = self.embedding(tokens_BS).to(self.compute_dtype)
        stats: list[RouterStats] = []
        for layer, block in enumerate(self.layers):
            if cache is None:
                # The layer's number would make torch.compile build each block anew.
                x_BSD, block_stats = block(x_BSD, rotary, prepared, row_weight_B)
            else:
                x_BSD, block_stats = block(x_BSD, rotary, prepared, row_weight_B, cache, layer)
            if block_stats is not None:
                stats.append(block_stats)
        return self.final_norm(x_BSD), stats

    def _router_loss(self, stats: list[RouterStats], like: Tensor) -> Tensor:
        moe = self.config.moe
        total = torch.zeros_like(like)
        if moe is None:
            return total
        for layer in stats:
            if moe.balance == "aux_loss":
                total = total + moe.aux_loss_weight * layer.balance_sum
            if moe.z_loss_weight > 0:
                total = total + moe.z_loss_weight * layer.z_sum
        return total

    @torch.no_grad()
    def update_balance_bias(self, counts_LE: Tensor) -> None:
        """After an optimizer step: raises the selection bias of underloaded experts and lowers that of overloaded ones
        by `bias_update_rate` (DeepSeek-V3, section 2.1.2). counts_LE: rows each expert got in the whole global batch."""
        layers = [block.moe for block in self.layers if isinstance(block, Block) and block.moe is not None]
        for moe, counts_E in zip(layers, counts_LE, strict=True):
            bias_E = moe.router.balance_bias
            if bias_E is not None:
                load_E = counts_E.float()
                bias_E += moe.router.config.bias_update_rate * (load_E.mean() - load_E).sign()
