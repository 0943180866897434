"""The `[generate]` section: how text is sampled. Imports without torch."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class GenerateConfig(BaseModel):
    """Sampling from a trained model."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    prompts: list[str] = ["import", "def main(", "class Node", "    if not"]
    """Texts to continue; an empty text starts a new document. One that ends in a space is often continued badly, since the
    space belongs to the next word in most tokenizers."""
    max_new_tokens: int = Field(default=96, gt=0)
    """Most tokens to add to each prompt; a sequence ends earlier at the end-of-text token or the model's max_seq_len."""
    temperature: float = Field(default=0.8, ge=0)
    """Divides the logits before sampling; 0 always takes the likeliest token (greedy)."""
    top_k: int = Field(default=0, ge=0)
    """Sample from the top_k likeliest tokens only; 0 for no limit."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Sample from the fewest likeliest tokens whose probabilities reach this sum; 1 for no limit."""
    stop: list[str] = []
    """Further tokens that end a sequence, each one token of the vocabulary, besides end-of-text."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws; the same seed and prompts give the same text on the same device."""

    @model_validator(mode="after")
    def _prompts_given(self) -> Self:
        if not self.prompts:
            raise ValueError("prompts must hold at least one text; an empty text is allowed")
        return self
