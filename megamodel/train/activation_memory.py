"""What the blocks of a decoder keep between forward and backward: all, some operations' results, their input, or nothing here.

Checkpointing of layers: Chen et al. 2016; by operation: Korthikanti et al. 2022, section 5.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megamodel.model.decoder import Decoder
from megamodel.train.activation_offload import ActivationOffload
from megamodel.train.config import ActivationMemoryConfig

_OPERATIONS = {
    "matmul": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm", "mega::grouped_mm"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_flash_attention_forward",
        "aten::_efficient_attention_forward",
        "torch_attn::_varlen_attn",
    ),
}
# Saved, a collective is not repeated: its wait is an operator of the same namespace. On CUDA the compiler may have put a
# product and its collective into one operator of the other.
_COLLECTIVE_NAMESPACES = ("_c10d_functional", "symm_mem")


def apply_activation_memory(
    decoder: Decoder,
    config: ActivationMemoryConfig,
    *,
    compile_blocks: Callable[[Decoder], None] | None = None,
) -> None:
    """Changes `forward` of the blocks in `decoder.layers` in place; gradients stay what they were.

    `compile_blocks(decoder)` is called in between: which operations are recomputed is for the compiler to see, and whole
    blocks are recomputed or offloaded around what it has made, since of a block that it cannot take in one piece (context
    or expert parallelism) it would compile nothing at all. So `selective` runs such blocks uncompiled.

    Children of `decoder.layers` are named by their layer in the whole model, so that each n-th is the same one in any
    layout. Recomputation repeats collectives that are not kept, on all ranks in the same order. `offload_of` finds the
    store of `mode = "offload"`.
    """
    chosen = [
        (int(name), block) for name, block in decoder.layers.named_children() if is_treated(int(name), config)
    ]  # fmt: skip
    if config.mode == "selective":
        for _, block in chosen:
            block.forward = _recomputed(block.forward, config)
    if compile_blocks is not None:
        compile_blocks(decoder)
    if config.mode == "full":
        for _, block in chosen:
            block.forward = _recomputed(block.forward, config)
    if config.mode == "offload":
        offload = ActivationOffload()
        for layer, block in chosen:
            offload.wrap(block, layer)


def offload_of(decoder: Decoder) -> ActivationOffload | None:
    """The store into which a decoder's blocks move what they save, if they do."""
    return next((found for block in decoder.layers.values() if (found := getattr(block, "offload", None))), None)


def is_treated(layer: int, config: ActivationMemoryConfig) -> bool:
    """Whether the mode applies to block `layer` of the whole model."""
    return config.mode != "none" and layer % config.every_n_layers == 0


def _recomputed(forward: Callable[..., Any], config: ActivationMemoryConfig) -> Callable[..., Any]:
    options: dict[str, Any] = {}
    if config.mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_keep_or_recompute, config.save))

    def recomputed(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        # The model draws no random numbers, so there is no generator's state to keep.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)

    return recomputed


def _keep_or_recompute(
    save: tuple[str, ...], context: Any, operation: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    name = operation.name().partition(".")[0]
    kept = any(name in _OPERATIONS.get(kind, ()) for kind in save)
    if "collective" in save and operation.namespace in _COLLECTIVE_NAMESPACES:
        kept = True
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
