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
    BesideRoutedExperts,
    InOrder,
    KeyValueCache,
    LocalExchange,
    ScaledDotProduct,
    SequenceShare,
    TokenExchange,
    TokenLoss,
    WholeSequences,
)


@dataclass(frozen=True, kw_only=True)
class LayerRange:
    """Blocks `first` to `end` - 1 of a decoder. The range that begins at 0 has the embedding too, and the one that ends at
    the last block the final norm and the output matrix."""

    first: int
    end: int


class HiddenTerms(NamedTuple):
    """What a part of a decoder without its end gives."""

    x_BSD: Tensor
    """Hidden states for the next part."""
    router_loss_sum: Tensor
    """As in `LossTerms`, of this part's routers."""
    router_stats: list[RouterStats]
    """One for each MoE layer here."""


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
    sequence_share: SequenceShare = field(default_factory=WholeSequences)
    beside_routed_experts: BesideRoutedExperts = field(default_factory=InOrder)
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
            self.moe = MoE(
                config.d_model,
                config.moe,
                seams.token_exchange,
                seams.sequence_share,
                seams.beside_routed_experts,
            )
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
    """A decoder-only language model, or a range of its blocks, whose names stay those of the whole.

    `compute_dtype` is that of activations and products; weights keep their own.
    """

    def __init__(self, config: ModelConfig, seams: Seams | None = None, layers: LayerRange | None = None) -> None:
        super().__init__()
        seams = seams or Seams()
        layers = layers or LayerRange(first=0, end=config.num_layers)
        self.config = config
        self.is_first = layers.first == 0
        self.is_last = layers.end == config.num_layers
        self.compute_dtype = torch.float32
        self.attention_core = seams.attention_core
        self.token_loss = seams.token_loss
        # With tied embeddings the last part needs the matrix as well as the first.
        has_embedding = self.is_first or (self.is_last and config.tie_embeddings)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model) if has_embedding else None
        self.layers = nn.ModuleDict(
            {str(layer): Block(config, layer, seams) for layer in range(layers.first, layers.end)}
        )
        self.final_norm = RMSNorm(config.d_model, config.norm_eps) if self.is_last else None
        has_head = self.is_last and not config.tie_embeddings
        self.lm_head = Linear(config.d_model, config.vocab_size) if has_head else None

    @property
    def output_weight(self) -> Tensor:
        """The (V, D) matrix that turns hidden states into logits, of a decoder that has its end."""
        source = self.lm_head if self.lm_head is not None else self.embedding
        assert source is not None
        return source.weight

    def forward(
        self,
        inputs: Tensor,
        labels_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        cache: KeyValueCache | None = None,
        *,
        positions_S: Tensor | None = None,
        row_weight_B: Tensor | None = None,
    ) -> Any:
        """`LossTerms` where labels are given, and otherwise logits (B, S, V) in float32; of a part without the end,
        `HiddenTerms`.

        inputs: int64 ids (B, S); for a part without the beginning, hidden states.
        labels_BS: the id that should follow each token, negative where none counts.
        document_ids_BS: attention stays within equal ids; with a cache they cover the cached tokens too.
        cache: the tokens follow those that it holds.
        positions_S: where in its sequence each token stands; without, they follow one another from the start.
        row_weight_B: valid labels of each sequence; needed where `labels_BS` are not those of the whole sequence.
        """
        if row_weight_B is None and labels_BS is not None:
            row_weight_B = (labels_BS >= 0).sum(dim=1).float()
        past = 0 if cache is None else cache.length
        if positions_S is None:
            positions_S = torch.arange(past, past + inputs.shape[1], device=inputs.device)
        x_BSD = inputs
        if self.is_first:
            assert self.embedding is not None
            x_BSD = self.embedding(inputs).to(self.compute_dtype)
        x_BSD, stats = self._blocks(x_BSD, positions_S, document_ids_BS, row_weight_B, cache)
        if not self.is_last:
            return HiddenTerms(x_BSD, self._router_loss(stats, x_BSD), stats)
        assert self.final_norm is not None
        x_BSD = self.final_norm(x_BSD)
        if labels_BS is None:
            return F.linear(x_BSD, self.output_weight.to(x_BSD.dtype)).float()
        token_loss = self.token_loss(x_BSD.flatten(0, 1), self.output_weight, labels_BS.flatten())
        return LossTerms(token_loss, self._router_loss(stats, x_BSD), stats)

    def _blocks(
        self,
        x_BSD: Tensor,
        positions_S: Tensor,
        document_ids_BS: Tensor | None,
        row_weight_B: Tensor | None,
        cache: KeyValueCache | None,
    ) -> tuple[Tensor, list[RouterStats]]:
        past = 0 if cache is None else cache.length
        mla = self.config.mla
        rotary_dim = self.config.head_dim if mla is None else mla.qk_rope_head_dim
        rotary = rotary_table(positions_S, rotary_dim, self.config.rope_theta)
        seq = positions_S.shape[0]
        prepared = self.attention_core.prepare(document_ids_BS, seq, past + seq, x_BSD.device)
        stats: list[RouterStats] = []
        for layer, block in self.layers.items():
            if cache is None:
                # The layer's number would make torch.compile build each block anew.
                x_BSD, block_stats = block(x_BSD, rotary, prepared, row_weight_B)
            else:
                x_BSD, block_stats = block(x_BSD, rotary, prepared, row_weight_B, cache, int(layer))
            if block_stats is not None:
                stats.append(block_stats)
        return x_BSD, stats

    def _router_loss(self, stats: list[RouterStats], like: Tensor) -> Tensor:
        moe = self.config.moe
        total = torch.zeros((), dtype=torch.float32, device=like.device)
        if moe is None:
            return total
        for layer in stats:
            if moe.balance == "aux_loss":
                total = total + moe.aux_loss_weight * layer.balance_sum
            if moe.z_loss_weight > 0:
                total = total + moe.z_loss_weight * layer.z_sum
        return total

    def moe_layers(self) -> list[tuple[int, MoE]]:
        """The MoE layers here, each with its number among the MoE layers of the whole model."""
        numbers = [layer for layer in range(self.config.num_layers) if self.config.is_moe_layer(layer)]
        found = []
        for layer, block in self.layers.items():
            if isinstance(block, Block) and block.moe is not None:
                found.append((numbers.index(int(layer)), block.moe))
        return found

    @torch.no_grad()
    def update_balance_bias(self, counts_LE: Tensor) -> None:
        """After an optimizer step: raises the selection bias of underloaded experts and lowers that of overloaded ones
        by `bias_update_rate` (DeepSeek-V3, section 2.1.2). counts_LE: rows each expert of each MoE layer of the whole
        model got in the whole global batch."""
        for index, moe in self.moe_layers():
            counts_E, bias_E = counts_LE[index], moe.router.balance_bias
            if bias_E is not None:
                load_E = counts_E.float()
                bias_E += moe.router.config.bias_update_rate * (load_E.mean() - load_E).sign()
