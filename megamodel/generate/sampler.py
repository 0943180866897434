"""Choice of the next token from logits.

Shape suffixes: B batch, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megamodel.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Temperature, then top-k (Fan et al. 2018), then nucleus or top-p (Holtzman et al. 2020, section 3.1)."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Only the top_k likeliest tokens; 0 for no limit."""
    top_p: float = 1.0
    """Only the fewest likeliest tokens whose probabilities (after top-k) reach this sum; 1 for no limit."""

    def __call__(self, logits_BV: Tensor, generator: torch.Generator | None) -> Tensor:
        """(B, V) -> (B,) int64. `generator` is on the device of the logits. Raises ModelError where a row has no finite
        logit or holds NaN."""
        highest_B = logits_BV.amax(dim=-1)
        if not bool(highest_B.isfinite().all()):
            raise ModelError(
                "the model's logits are NaN or infinite; its weights are damaged: take an earlier checkpoint"
            )
        if self.temperature == 0:
            return logits_BV.argmax(dim=-1)
        probabilities_BV, tokens_BV = self.probabilities(logits_BV)
        drawn_B1 = torch.multinomial(probabilities_BV, 1, generator=generator)
        return tokens_BV.gather(-1, drawn_B1).squeeze(-1)

    def probabilities(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """What is drawn from, likeliest first: probabilities (B, V), zero where ruled out, and the tokens they belong to."""
        # Subtracted first, so that a tiny temperature cannot overflow.
        scaled_BV = (logits_BV.float() - logits_BV.amax(dim=-1, keepdim=True)) / self.temperature
        scaled_BV, tokens_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            scaled_BV[:, self.top_k :] = -torch.inf
        probabilities_BV = scaled_BV.softmax(dim=-1)
        if self.top_p < 1:
            before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
            # The likeliest token always stays: nothing comes before it.
            probabilities_BV = probabilities_BV.masked_fill(before_BV >= self.top_p, 0.0)
            probabilities_BV = probabilities_BV / probabilities_BV.sum(dim=-1, keepdim=True)
        return probabilities_BV, tokens_BV
