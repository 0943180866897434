"""Continues sequences of token ids.

Shape suffixes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megamodel.errors import ModelError
from megamodel.generate.cache import PreallocatedCache
from megamodel.generate.sampler import Sampler
from megamodel.model.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What was added to one prompt."""

    tokens: list[int]
    """New ids, without the one that ended the sequence."""
    finish: Literal["stop", "length"]
    """Ended by a stop token, or by the limit on new tokens or the model's max_seq_len."""


@torch.inference_mode()
def generate_tokens(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    sampler: Sampler,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    usable_ids: int | None = None,
    generator: torch.Generator | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Continuation]:
    """Continues all prompts together, one token a step each.

    Prompts of unequal length are padded on the left and the padding is masked as a document of its own; rotary positions
    count only by their distance, so the shift does not matter. usable_ids: only ids below it are drawn (a tokenizer may
    know fewer than the model has). on_token(row, id) is called for each new token, stop tokens left out.
    Raises ModelError where a prompt is empty, holds an id outside the vocabulary, or leaves no room for a new token.
    """
    longest = _check_prompts(model, prompts)
    device = model.output_weight.device
    tokens_BS, document_ids_BS = _pad_left(prompts, longest, device)
    steps = min(max_new_tokens, model.config.max_seq_len - longest)
    cache = PreallocatedCache(
        model.config, batch_size=len(prompts), capacity=longest + steps, dtype=model.compute_dtype, device=device
    )
    new_tokens: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for _ in range(steps):
        logits_BV = model(tokens_BS, document_ids_BS=document_ids_BS, cache=cache)[:, -1, :usable_ids]
        next_B = sampler(logits_BV, generator)
        for row, token in enumerate(next_B.tolist()):
            if row not in running:
                continue
            if token in stop_ids:
                running.discard(row)
                continue
            new_tokens[row].append(token)
            if on_token is not None:
                on_token(row, token)
        if not running:
            break
        tokens_BS = next_B[:, None]
        if document_ids_BS is not None:
            document_ids_BS = torch.cat((document_ids_BS, document_ids_BS[:, -1:]), dim=1)
    return [
        Continuation(tokens=tokens, finish="length" if row in running else "stop")
        for row, tokens in enumerate(new_tokens)
    ]


def _check_prompts(model: Decoder, prompts: Sequence[Sequence[int]]) -> int:
    """Length of the longest prompt, in tokens."""
    limit, vocab_size = model.config.max_seq_len, model.config.vocab_size
    if not prompts:
        raise ModelError("there is no prompt to continue; give at least one")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise ModelError(f"prompt {number} has no token; start it with the end-of-text token")
        if len(prompt) >= limit:
            raise ModelError(
                f"prompt {number} has {len(prompt)} tokens and the model takes max_seq_len = {limit}, the new ones "
                f"included; shorten it to {limit - 1} tokens or fewer"
            )
        outside = [token for token in prompt if not 0 <= token < vocab_size]
        if outside:
            raise ModelError(
                f"prompt {number} holds token {outside[0]} and the model's vocab_size is {vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
    return max(len(prompt) for prompt in prompts)


def _pad_left(prompts: Sequence[Sequence[int]], longest: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, longest), and document ids that part padding (0) from prompt (1): none where nothing is padded."""
    padding = [longest - len(prompt) for prompt in prompts]
    tokens_BS = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts)], device=device)
    if not any(padding):
        return tokens_BS, None
    document_ids_BS = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding], device=device)
    return tokens_BS, document_ids_BS
