"""Where other parts plug into the decoder: small protocols, each with a default that works in a single process.

Shape suffixes: B batch, S sequence, H query heads, G key and value heads, D width of a head or of the model,
T tokens (B * S), R routed rows (T * top_k), E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class AttentionCore(Protocol):
    """Softmax attention between projected queries, keys and values."""

    def prepare(self, document_ids_BS: Tensor | None, num_queries: int, num_keys: int, device: torch.device) -> Any:
        """Whatever all layers of one forward pass share, such as a mask. The last query sits at the last key."""
        ...

    def __call__(self, q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, prepared: Any) -> Tensor:
        """Causal attention within each document; returns (B, H, S, width of v)."""
        ...


class TokenExchange(Protocol):
    """Carries rows, sorted by expert, to the processes that hold the experts, and back."""

    def dispatch(self, x_RD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Rows for the experts held here, how many each gets, and a handle for `combine`."""
        ...

    def combine(self, y_RD: Tensor, handle: Any) -> Tensor:
        """Results in the order in which `dispatch` was given the rows."""
        ...


class SequenceShare(Protocol):
    """The processes that hold other tokens of the same sequences, where a sequence is spread over several."""

    @property
    def size(self) -> int:
        """Among how many processes each sequence is spread, in equal parts."""
        ...

    def sum(self, counts: Tensor) -> Tensor:
        """Adds up counts (no gradient) over them."""
        ...


class BesideRoutedExperts(Protocol):
    """Runs a computation that may overlap the routed experts' communication."""

    def run(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Any:
        """Starts `function(x)`; returns a handle."""
        ...

    def join(self, handle: Any) -> Tensor:
        """The result, once what follows may use it."""
        ...


class TokenLoss(Protocol):
    """Cross-entropy from hidden states and the output matrix."""

    def __call__(self, x_TD: Tensor, w_VD: Tensor, labels_T: Tensor) -> Tensor:
        """Sum over tokens with label >= 0, in nats (a float32 scalar)."""
        ...


class KeyValueCache(Protocol):
    """Keys and values of the tokens seen so far, for step by step generation."""

    @property
    def length(self) -> int:
        """Tokens held before the current forward pass."""
        ...

    def update(self, layer: int, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """Appends one layer's new keys and values; returns all of them."""
        ...


class ScaledDotProduct:
    """`AttentionCore` on torch's fused attention: no mask for plain causal attention, a boolean one for documents."""

    def prepare(
        self, document_ids_BS: Tensor | None, num_queries: int, num_keys: int, device: torch.device
    ) -> Tensor | None:
        """None: plain causal (or a single query that sees all). Otherwise a (B or 1, 1, S, keys) mask, true = visible."""
        if document_ids_BS is None and num_queries in (1, num_keys):
            return None
        offset = num_keys - num_queries
        mask_SK = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(offset)
        if document_ids_BS is None:
            return mask_SK[None, None]
        same_BSK = document_ids_BS[:, offset:, None] == document_ids_BS[:, None, :]
        return (same_BSK & mask_SK)[:, None]

    def __call__(self, q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, prepared: Tensor | None) -> Tensor:
        """See `AttentionCore`."""
        return F.scaled_dot_product_attention(
            q_BHSD,
            k_BGSD,
            v_BGSD,
            attn_mask=prepared,
            is_causal=prepared is None and q_BHSD.shape[2] > 1,
            enable_gqa=q_BHSD.shape[1] != k_BGSD.shape[1],
        )


class LocalExchange:
    """`TokenExchange` of a process that holds every expert: nothing moves."""

    def dispatch(self, x_RD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, None]:
        """The rows and counts as given."""
        return x_RD, counts_E, None

    def combine(self, y_RD: Tensor, handle: None) -> Tensor:
        """The rows as given."""
        return y_RD


class WholeSequences:
    """`SequenceShare` of a process that holds every token of its sequences."""

    size = 1

    def sum(self, counts: Tensor) -> Tensor:
        """The counts as given."""
        return counts


class InOrder:
    """`BesideRoutedExperts` that runs the computation at once, where it stands."""

    def run(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`function(x)`."""
        return function(x)

    def join(self, handle: Tensor) -> Tensor:
        """The result."""
        return handle
