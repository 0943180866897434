"""Attention: causality, documents, grouped heads, rotary positions and latent attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megamodel.model.layers import RMSNorm
from megamodel.model.rope import rotary_table, rotate
from megamodel.model.seams import ScaledDotProduct
from tests.megamodel.small import MLA, MOE, build, random_tokens, small_config

KINDS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "qk_norm": {"qk_norm": True},
    "latent": {"mla": MLA},
    "moe": {"moe": MOE, "qk_norm": True},
}
CPU = torch.device("cpu")


def _attention(q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, visible_BSK: Tensor) -> Tensor:
    scores = q_BHSD @ k_BHSD.transpose(-1, -2) / q_BHSD.shape[-1] ** 0.5
    return scores.masked_fill(~visible_BSK[:, None], -torch.inf).softmax(-1) @ v_BHSD


@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_change_nothing_before_them(kind: str) -> None:
    config = small_config(**KINDS[kind])
    decoder = build(config)
    tokens = random_tokens(config, 2, 12)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % config.vocab_size
    before, after = decoder(tokens), decoder(changed)
    if kind == "moe":
        # Rows share a grouped product with others, whose number may change the order of sums.
        torch.testing.assert_close(before[:, :7], after[:, :7], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7], after[:, 7])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_across_documents_is_exactly_zero(kind: str) -> None:
    config = small_config(**KINDS[kind])
    decoder = build(config)
    tokens = random_tokens(config, 1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
    captured: list[Tensor] = []

    def capture(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        captured.append(leaf)
        return leaf

    decoder.embedding.register_forward_hook(capture)
    logits = decoder(tokens, document_ids_BS=documents)
    (gradient,) = torch.autograd.grad(logits[0, 5:9].square().sum(), captured)
    touched = gradient[0].abs().sum(-1) > 0
    assert touched.tolist() == [False] * 5 + [True] * 4 + [False] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_equal_separate_ones(kind: str) -> None:
    """Rotary positions count by distance only, so a document's place in the row does not matter."""
    config = small_config(**KINDS[kind])
    decoder = build(config)
    tokens = random_tokens(config, 2, 14)
    documents = torch.tensor([[0] * 6 + [1] * 8, [0] * 14])
    packed = decoder(tokens, document_ids_BS=documents)
    torch.testing.assert_close(packed[0, :6], decoder(tokens[:1, :6])[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed[0, 6:], decoder(tokens[:1, 6:])[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed[1], decoder(tokens[1:])[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(packed[0, 6:], decoder(tokens[:1])[0, 6:], atol=1e-2)


def test_grouped_heads_equal_repeated_heads() -> None:
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    core = ScaledDotProduct()
    found = core(q, k, v, core.prepare(None, 5, 5, CPU))
    visible = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    expected = _attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), visible)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_decoder_with_grouped_heads_equals_one_with_copied_heads() -> None:
    grouped = build(small_config())
    full = build(small_config(num_kv_heads=4))
    state = dict(grouped.state_dict())
    for name, tensor in state.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            state[name] = tensor.view(2, 8, -1).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    tokens = random_tokens(grouped.config, 2, 9)
    torch.testing.assert_close(full(tokens), grouped(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 5), (3, 5)])
@pytest.mark.parametrize("documents", [False, True])
def test_core_against_written_out_attention(queries: int, keys: int, documents: bool) -> None:
    q, k, v = torch.randn(2, 2, queries, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 6)
    ids = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 2]]) if documents else None
    visible = torch.zeros(2, queries, keys, dtype=torch.bool)
    for b in range(2):
        for i in range(queries):
            at = i + keys - queries
            for j in range(at + 1):
                visible[b, i, j] = ids is None or bool(ids[b, j] == ids[b, at])
    core = ScaledDotProduct()
    found = core(q, k, v, core.prepare(ids, queries, keys, CPU))
    torch.testing.assert_close(found, _attention(q, k, v, visible), rtol=1e-5, atol=1e-5)


def test_plain_causal_attention_needs_no_mask() -> None:
    core = ScaledDotProduct()
    assert core.prepare(None, 7, 7, CPU) is None
    assert core.prepare(None, 1, 7, CPU) is None


def test_rotation_depends_on_distance_only() -> None:
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(at_query: int, at_key: int) -> Tensor:
        table_q, table_k = (rotary_table(torch.tensor([at]), 16, 10_000.0) for at in (at_query, at_key))
        return (rotate(q, table_q) * rotate(k, table_k)).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(score(9, 4), score(9, 3), atol=1e-4)


def test_rotation_by_its_formula() -> None:
    x = torch.randn(1, 1, 3, 4)
    table = rotary_table(torch.arange(5, 8), 4, 100.0)
    assert table.shape == (2, 3, 2)
    found = rotate(x, table)
    for position in range(3):
        for pair in range(2):
            angle = torch.tensor((5 + position) * 100.0 ** (-2 * pair / 4))
            a, b = x[0, 0, position, pair], x[0, 0, position, pair + 2]
            torch.testing.assert_close(found[0, 0, position, pair], a * angle.cos() - b * angle.sin())
            torch.testing.assert_close(found[0, 0, position, pair + 2], b * angle.cos() + a * angle.sin())
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), table).dtype == torch.bfloat16


def test_latent_attention_shapes() -> None:
    config = small_config(mla=MLA)
    attention = build(config).layers["0"].attention
    shapes = {name: tuple(parameter.shape) for name, parameter in attention.named_parameters()}
    assert shapes == {
        "q_down.weight": (12, 32),
        "q_latent_norm.weight": (12,),
        "q_up.weight": (4 * (6 + 4), 12),
        "kv_down.weight": (10 + 4, 32),
        "kv_latent_norm.weight": (10,),
        "kv_up.weight": (4 * (6 + 8), 10),
        "o_proj.weight": (32, 4 * 8),
    }


def test_latent_attention_by_its_formula() -> None:
    """DeepSeek-V2, eq. 9-19, head by head."""
    config = small_config(mla=MLA)
    attention: Any = build(config).layers["0"].attention
    x_SD, table = torch.randn(5, 32), rotary_table(torch.arange(5), 4, config.rope_theta)
    found = attention(x_SD[None], table, None)[0]

    q_S = attention.q_latent_norm(x_SD @ attention.q_down.weight.t()) @ attention.q_up.weight.t()
    down_S = x_SD @ attention.kv_down.weight.t()
    kv_S = attention.kv_latent_norm(down_S[:, :10]) @ attention.kv_up.weight.t()
    key_rope = rotate(down_S[None, None, :, 10:], table)[0, 0]
    heads = []
    for head in range(4):
        q = q_S[:, head * 10 : (head + 1) * 10]
        q = torch.cat((q[:, :6], rotate(q[None, None, :, 6:], table)[0, 0]), -1)
        kv = kv_S[:, head * 14 : (head + 1) * 14]
        scores = q @ torch.cat((kv[:, :6], key_rope), -1).t() / 10**0.5
        scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
        heads.append(scores.softmax(-1) @ kv[:, 6:])
    expected = torch.cat(heads, -1) @ attention.o_proj.weight.t()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_norm_by_its_formula_and_in_float32() -> None:
    norm = RMSNorm(8, 1e-3)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 8)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    exact = norm(x.bfloat16().float()).bfloat16()
    assert torch.equal(norm(x.bfloat16()), exact)
