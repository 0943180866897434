"""The formulas of what a block keeps, against what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamodel.model.decoder import Seams
from megamodel.model.explicit_attention import ExplicitScores
from megamodel.model.rope import rotary_table
from megamodel.train.activation_bytes import ActivationSetting, kept_by_block
from megamodel.train.activation_memory import apply_activation_memory
from megamodel.train.config import ActivationMemoryConfig
from parallel.layout import Layout
from parallel.memory_tracker import MemoryTracker
from tests.megamodel.small import build, small_config

BATCH, SEQ = 3, 32
MOE = {"num_experts": 8, "top_k": 2, "d_ff": 48}
MLA = {"q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "qk_norm": {"qk_norm": True},
    "moe": {"moe": MOE},
    "sigmoid": {"moe": {**MOE, "num_shared_experts": 1, "router_score": "sigmoid", "balance": "bias"}},
    "mla": {"mla": MLA},
}


def measured(setting: ActivationSetting, memory: ActivationMemoryConfig) -> int:
    """Bytes that live more after a block's forward than before, without its result, which the next block counts."""
    explicit = setting.attention == "explicit"
    decoder = build(setting.model, seams=Seams(attention_core=ExplicitScores()) if explicit else None)
    dtype = torch.float32 if setting.activation_bytes == 4 else torch.bfloat16
    if not setting.casts_weights:
        for name, parameter in decoder.named_parameters():
            if not name.endswith(("norm.weight", "router.weight")):
                parameter.data = parameter.data.to(dtype)
    apply_activation_memory(decoder, memory)
    documents = (torch.arange(SEQ) >= 9).int().expand(BATCH, -1) if setting.document_mask else None
    prepared = decoder.attention_core.prepare(documents, SEQ, SEQ, torch.device("cpu"))
    mla = setting.model.mla
    width = mla.qk_rope_head_dim if mla else setting.model.head_dim
    rotary = rotary_table(torch.arange(SEQ), width, setting.model.rope_theta)
    weights_B = torch.ones(BATCH)
    leaf_BSD = torch.randn(BATCH, SEQ, setting.model.d_model, dtype=dtype, requires_grad=True)
    with MemoryTracker() as tracker:
        tracker.adopt([*decoder.parameters(), *decoder.buffers(), rotary, weights_B, prepared])
        before = tracker.current.total
        x_BSD = leaf_BSD.clone()
        out_BSD, _ = decoder.layers["0"](x_BSD, rotary, prepared, weights_B)
        result = out_BSD.untyped_storage().nbytes()
        del x_BSD
        return tracker.current.total - before - result


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16 weights"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "memory",
    [
        ActivationMemoryConfig(),
        ActivationMemoryConfig(mode="full"),
        ActivationMemoryConfig(mode="selective"),
        ActivationMemoryConfig(mode="selective", save=("attention",)),
    ],
    ids=["none", "full", "selective", "attention"],
)
def test_one_block(shape: str, precision: str, memory: ActivationMemoryConfig) -> None:
    setting = ActivationSetting(
        model=small_config(num_layers=1, d_model=64, num_heads=4, head_dim=16, d_ff=96, **SHAPES[shape]),
        layout=Layout(),
        micro_batch_size=BATCH,
        seq_len=SEQ,
        activation_bytes=4 if precision == "fp32" else 2,
        casts_weights=precision == "bf16",
    )
    expected = sum(kept_by_block(setting, 0, memory).values())
    assert expected == pytest.approx(measured(setting, memory), rel=0.01)


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_explicit_scores(precision: str, document_mask: bool) -> None:
    setting = ActivationSetting(
        model=small_config(num_layers=1, d_model=64, num_heads=4, head_dim=16, d_ff=96),
        layout=Layout(),
        micro_batch_size=BATCH,
        seq_len=SEQ,
        activation_bytes=4 if precision == "fp32" else 2,
        casts_weights=precision == "bf16",
        attention="explicit",
        document_mask=document_mask,
    )
    memory = ActivationMemoryConfig()
    assert sum(kept_by_block(setting, 0, memory).values()) == pytest.approx(measured(setting, memory), rel=0.01)
