"""Blocks of attention, by kernel and in plain torch, against one softmax over all keys."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from parallel import context_blocks
from parallel.context_blocks import BlockOutput, attend, attend_backward, flash_cuda_backward, merge_into

HEADS, GROUPS, QUERIES, KEYS = 4, 2, 7, 11


def tensors(*widths: int, keys: int = KEYS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    qk_width, v_width = widths
    shapes = [(2, HEADS, QUERIES, qk_width), (2, GROUPS, keys, qk_width), (2, GROUPS, keys, v_width)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def one_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    repeats = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(repeats, dim=1).transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v.repeat_interleave(repeats, dim=1), scores.logsumexp(dim=-1)


def random_mask(*, blind: int | None = None) -> Tensor:
    mask = torch.rand(2, 1, QUERIES, KEYS, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[..., 5] = True
    if blind is not None:
        mask[:, :, blind] = False
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("widths", [(8, 8), (8, 4)], ids=["kernel", "plain"])
def test_a_row_that_sees_nothing_is_zero_with_no_weight(widths: tuple[int, int], dtype: torch.dtype) -> None:
    q, k, v = tensors(*widths, dtype=dtype)
    block = attend(q, k, v, causal=False, mask=random_mask(blind=3))
    assert (block.lse_BHQ[:, :, 3] == float("-inf")).all()
    assert (block.out_BHQD[:, :, 3] == 0).all()
    assert block.lse_BHQ[:, :, :3].isfinite().all()


@pytest.mark.parametrize("widths", [(8, 8), (8, 4)], ids=["kernel", "plain"])
@pytest.mark.parametrize("visible", ["all", "causal", "mask", "nothing"])
@pytest.mark.parametrize("tile", [3, 512])
def test_two_blocks_are_one_softmax(widths: tuple[int, int], visible: str, tile: int) -> None:
    """The second block is plain, causal, masked, or sees nothing at all in some rows."""
    q, k, v = (x.requires_grad_() for x in tensors(*widths, keys=KEYS + QUERIES))
    causal = visible == "causal"
    mask = (
        random_mask(blind=3 if visible == "nothing" else None)[..., :QUERIES]
        if visible in ("mask", "nothing")
        else None
    )
    seen = torch.ones(2, 1, QUERIES, QUERIES, dtype=torch.bool) if mask is None else mask
    seen = seen.tril() if causal else seen
    whole = torch.cat((torch.ones(2, 1, QUERIES, KEYS, dtype=torch.bool), seen), dim=-1)
    out, lse = one_softmax(q, k, v, whole)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    expected = torch.autograd.grad(out, (q, k, v), grad)

    cuts = [(slice(0, KEYS), False, None), (slice(KEYS, None), causal, mask)]
    total = BlockOutput(out_BHQD=torch.zeros_like(out), lse_BHQ=torch.full_like(lse, float("-inf")))
    found = [torch.zeros_like(x) for x in (q, k, v)]
    with patch.object(context_blocks, "_TILE", tile), torch.no_grad():
        for keys, is_causal, cut_mask in cuts:
            merge_into(total, attend(q, k[:, :, keys], v[:, :, keys], causal=is_causal, mask=cut_mask))
        for keys, is_causal, cut_mask in cuts:
            part = attend_backward(grad, q, k[:, :, keys], v[:, :, keys], total, causal=is_causal, mask=cut_mask)
            found[0] += part.q_BHQD
            found[1][:, :, keys] += part.k_BGKD
            found[2][:, :, keys] += part.v_BGKD
    torch.testing.assert_close(total.out_BHQD, out)
    torch.testing.assert_close(total.lse_BHQ, lse)
    torch.testing.assert_close(found, list(expected))


def test_merging_nothing_with_nothing_is_nothing() -> None:
    def empty() -> BlockOutput:
        return BlockOutput(out_BHQD=torch.zeros(1, 1, 2, 3), lse_BHQ=torch.full((1, 1, 2), float("-inf")))

    total = empty()
    merge_into(total, empty())
    assert (total.out_BHQD == 0).all()
    assert (total.lse_BHQ == float("-inf")).all()


def test_call_of_the_cuda_kernel_fits_its_signature() -> None:
    """Shapes only, on meta: what can be said of it without the device."""
    q, k, v = (x.to("meta", torch.bfloat16) for x in tensors(8, 8))
    gradients = flash_cuda_backward(q, q, k, v, q, torch.empty(2, HEADS, QUERIES, device="meta"), False)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [False, True])
def test_cuda_kernel_is_plain_attention(causal: bool) -> None:
    keys = QUERIES if causal else KEYS
    q, k, v = (x.cuda() for x in tensors(16, 16, keys=keys, dtype=torch.bfloat16))
    grad = torch.randn_like(q)
    kernel = attend(q, k, v, causal=causal, mask=None)
    by_kernel = attend_backward(grad, q, k, v, kernel, causal=causal, mask=None)
    with patch.object(context_blocks, "_kernel", lambda *_: "plain"):
        plain = attend(q, k, v, causal=causal, mask=None)
        plainly = attend_backward(grad, q, k, v, plain, causal=causal, mask=None)
    close = {"rtol": 2e-2, "atol": 2e-2, "check_dtype": False}
    torch.testing.assert_close(kernel.out_BHQD, plain.out_BHQD, **close)
    torch.testing.assert_close(kernel.lse_BHQ, plain.lse_BHQ, **close)
    for name in ("q_BHQD", "k_BGKD", "v_BGKD"):
        torch.testing.assert_close(getattr(by_kernel, name), getattr(plainly, name), **close)
