"""Context parallel attention against plain attention over whole rows in one process: outputs and every gradient.

Shape suffixes: B batch, S sequence, H query heads, G key and value heads, D width of a head.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import context_ring
from parallel.context import AllGatherAttention, LocalAttention, UlyssesAttention, context_attention
from parallel.context_order import gather_rows, zigzag_cut, zigzag_join, zigzag_positions
from parallel.context_ring import RingAttention
from parallel.errors import ParallelError
from parallel.mesh import Axis, single_axis
from parallel.world import World
from tests.gloo_pool import GlooPool

METHODS = ("all_gather", "ring", "ulysses")
BATCH, ROW = 2, 48


@dataclass(frozen=True)
class Case:
    method: str
    documents: bool
    window: int | None
    heads: int = 8
    groups: int = 2
    widths: tuple[int, int] = (8, 8)
    dtype: torch.dtype = torch.float32
    tile: int = 512


class Reference:
    """The obvious attention, and the `inner` of Ulysses."""

    def __init__(self, window: int | None = None) -> None:
        self.window = window

    def prepare(self, document_ids_BS: Tensor | None, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        assert num_queries == num_keys
        position = torch.arange(num_keys)
        mask = (position[:, None] >= position)[None]
        if self.window is not None:
            mask = mask & (position > position[:, None] - self.window)
        if document_ids_BS is not None:
            mask = mask & (document_ids_BS[:, :, None] == document_ids_BS[:, None, :])
        return mask[:, None]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, prepared: Tensor) -> Tensor:
        repeats = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(repeats, dim=1).transpose(-1, -2) * q.shape[-1] ** -0.5
        return scores.masked_fill(~prepared, float("-inf")).softmax(dim=-1) @ v.repeat_interleave(repeats, dim=1)


class Fused(Reference):
    """torch's fused attention."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, prepared: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=prepared, enable_gqa=q.shape[1] != k.shape[1])


def cp_axis(world: World) -> Axis:
    ranks = tuple(range(world.world_size))
    return Axis(name="cp", size=world.world_size, rank=world.rank, ranks=ranks, group=dist.group.WORLD)


def documents() -> Tensor:
    """Lengths that no chunk knows of; the second row's ids come back after another document, as padding's may."""
    first = torch.tensor([0] * 5 + [1] * 20 + [2] * 3 + [3] * 20)
    return torch.stack((first, torch.tensor([7] * 30 + [9] * 18)))


def whole_tensors(case: Case) -> list[Tensor]:
    """q, k, v and the output's gradient, over whole rows."""
    generator = torch.Generator().manual_seed(0)
    qk_width, v_width = case.widths
    heads_and_widths = [
        (case.heads, qk_width), (case.groups, qk_width), (case.groups, v_width), (case.heads, v_width),
    ]  # fmt: skip
    return [
        torch.randn(BATCH, heads, ROW, width, generator=generator, dtype=torch.float64).to(case.dtype)
        for heads, width in heads_and_widths
    ]


def run(core: LocalAttention, tensors: list[Tensor], document_ids: Tensor | None) -> list[Tensor]:
    """The output and the gradients of q, k, v."""
    q, k, v, grad = tensors
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    seq = q.shape[2]
    out = core(*leaves, core.prepare(document_ids, seq, seq, q.device))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def differences(world: World, cases: list[Case], axis: Axis | None = None) -> list[list[float]]:
    """For each case, the largest differences of output, dq, dk, dv from plain attention over whole rows in float64."""
    axis = axis or cp_axis(world)
    found = []
    for case in cases:
        ids = documents() if case.documents else None
        whole = whole_tensors(case)
        expected = run(Reference(case.window), [x.double() for x in whole], ids)
        core = context_attention(case.method, axis, Reference(), case.window)  # type: ignore[arg-type]
        mine = [zigzag_cut(x, axis, dim=2) for x in whole]
        with patch.object(context_ring, "_TILE", case.tile):
            results = run(core, mine, None if ids is None else zigzag_cut(ids, axis, dim=1))
        assert all(x.dtype == case.dtype for x in results)
        pairs = zip(results, expected, strict=True)
        found.append([(x.double() - zigzag_cut(y, axis, dim=2)).abs().max().item() for x, y in pairs])
    return found


def all_cases() -> list[Case]:
    """Windows: within a chunk, across chunks, and longer than some rows of chunks."""
    plain = [
        Case(method, documents, window)
        for method, documents, window in itertools.product(METHODS, (False, True), (None, 3, 14, 40))
    ]
    in_float64 = [Case(method, True, 14, dtype=torch.float64) for method in METHODS]
    odd_heads = [
        Case(method, documents, None, heads=heads, groups=groups, widths=widths)
        for method, documents in itertools.product(METHODS, (False, True))
        for heads, groups, widths in ((4, 4, (8, 8)), (4, 1, (8, 8)), (12, 3, (8, 4)))
    ]
    tiled = [Case("ring", documents, window, tile=2) for documents in (False, True) for window in (None, 3, 14)]
    return plain + in_float64 + odd_heads + tiled


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_method_is_plain_attention(gloo_ranks: GlooPool, num_ranks: int) -> None:
    cases = all_cases()
    for rank, found in enumerate(gloo_ranks(num_ranks, differences, cases, timeout_s=120)):
        for case, errors in zip(cases, found, strict=True):
            limit = 1e-12 if case.dtype == torch.float64 else 1e-5
            assert max(errors) <= limit, f"rank {rank}, {case}: out, dq, dk, dv differ by {errors}"


def differences_on_every_other_rank(world: World, cases: list[Case]) -> list[list[float]]:
    """As where tp lies within cp: two axes side by side, whose neighbours are not neighbours in rank."""
    axes = [(ranks, dist.new_group(list(ranks))) for ranks in ((0, 2), (1, 3))]
    ranks, group = axes[world.rank % 2]
    return differences(world, cases, Axis(name="cp", size=2, rank=world.rank // 2, ranks=ranks, group=group))


def test_an_axis_is_not_the_world(gloo_ranks: GlooPool) -> None:
    for found in gloo_ranks(4, differences_on_every_other_rank, [Case(method, True, None) for method in METHODS]):
        assert max(map(max, found)) <= 1e-5


def test_an_odd_number_of_ranks(gloo_ranks: GlooPool) -> None:
    cases = [Case(method, True, 14, heads=6) for method in METHODS] + [Case("ring", False, None, heads=6)]
    for found in gloo_ranks(3, differences, cases):
        assert max(map(max, found)) <= 1e-5


def rounding(world: World) -> list[tuple[str, list[float], list[float]]]:
    """Relative errors of out, dq, dk, dv in bf16 against float64: of each method, and of torch's attention in one process."""
    axis = cp_axis(world)

    def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
        return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, expected, strict=True)]

    record = []
    for method, ids in itertools.product(METHODS, (None, documents())):
        whole = whole_tensors(Case(method, ids is not None, None, dtype=torch.bfloat16))
        expected = run(Reference(), [x.double() for x in whole], ids)
        one_process = errors(run(Fused(), whole, ids), expected)
        core = context_attention(method, axis, Fused())  # type: ignore[arg-type]
        mine = [zigzag_cut(x, axis, dim=2) for x in whole]
        results = run(core, mine, None if ids is None else zigzag_cut(ids, axis, dim=1))
        parts = [gather_rows(x, axis, dim=2) for x in results]
        record.append((method, errors(parts, expected), one_process))
    return record


def test_bf16_rounds_like_attention_in_one_process(gloo_ranks: GlooPool) -> None:
    for record in gloo_ranks(2, rounding):
        for method, errors, one_process in record:
            for error, alone in zip(errors, one_process, strict=True):
                assert 1e-4 < error <= 1.25 * alone, f"{method}: out, dq, dk, dv {errors}, in one process {one_process}"


def test_one_rank_with_a_window_is_plain_attention() -> None:
    axis = single_axis("cp")
    for method, window in itertools.product(METHODS, (3, 40)):
        whole = whole_tensors(Case(method, True, window))
        core = context_attention(method, axis, Reference(), window)  # type: ignore[arg-type]
        torch.testing.assert_close(run(core, whole, documents()), run(Reference(window), whole, documents()))


def test_one_rank_without_window_is_the_inner_core() -> None:
    inner = Reference()
    assert all(context_attention(method, single_axis("cp"), inner) is inner for method in METHODS)  # type: ignore[arg-type]


def gradients_across_documents(world: World) -> list[float]:
    """Backward from the first document's outputs: the most that reaches keys and values of the others, and its own."""
    axis = cp_axis(world)
    ids = documents()
    in_first = ids == ids[:, :1]
    found = []
    for method in METHODS:
        q, k, v, grad = whole_tensors(Case(method, True, None))
        grad = grad * in_first[:, None, :, None]
        mine = [zigzag_cut(x, axis, dim=2) for x in (q, k, v, grad)]
        core = context_attention(method, axis, Reference())  # type: ignore[arg-type]
        _, dq, dk, dv = run(core, mine, zigzag_cut(ids, axis, dim=1))
        other = ~zigzag_cut(in_first, axis, dim=1)[:, None, :, None].expand_as(dk)
        found.append(max(dk[other].abs().max().item(), dv[other].abs().max().item()))
        assert dv[~other].abs().max() > 0
        assert not dq.isnan().any()
    return found


def test_documents_never_see_each_other(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(4, gradients_across_documents) == [[0.0] * len(METHODS)] * 4


def saved_sizes(world: World, method: str, row: int) -> int:
    """The elements that autograd keeps for one call of a core, with documents and window."""
    axis = cp_axis(world)
    seq = row // axis.size
    q, k, v = (torch.randn(1, 2, seq, 4, requires_grad=True) for _ in range(3))
    core = context_attention(method, axis, Reference(), window=row // 2)  # type: ignore[arg-type]
    prepared = core.prepare(torch.zeros(1, seq, dtype=torch.long), seq, seq, q.device)
    saved: list[int] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        core(q, k, v, prepared)
    return sum(saved)


def test_ring_keeps_memory_linear_in_the_row(gloo_ranks: GlooPool) -> None:
    row = 256
    tokens = 2 * row // 2  # heads x tokens of a rank
    assert gloo_ranks(2, saved_sizes, "ring", row) == [tokens * (4 * 4 + 1)] * 2  # q, k, v, out, lse


class _Collectives(TorchDispatchMode):
    """(operator, bytes handed to it) of each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "_c10d_functional" in str(func) and name != "wait_tensor":
            self.seen.append((name, args[0].numel() * args[0].element_size()))
        return func(*args, **(kwargs or {}))


def traffic(world: World, dtype: torch.dtype) -> dict[str, list[list[tuple[str, int]]]]:
    """What each method sends in `prepare` (with documents), forward and backward."""
    axis = cp_axis(world)
    found = {}
    batch_isend_irecv = dist.batch_isend_irecv
    for method in METHODS:
        q, k, v, grad = (zigzag_cut(x, axis, dim=2) for x in whole_tensors(Case(method, True, None, dtype=dtype)))
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        core = context_attention(method, axis, Reference())  # type: ignore[arg-type]
        phases: list[list[tuple[str, int]]] = []
        with _Collectives() as mode:

            def post(ops: list[Any]) -> Any:
                mode.seen.extend(
                    ("send", op.tensor.numel() * op.tensor.element_size()) for op in ops if op.op is dist.isend
                )
                return batch_isend_irecv(ops)

            with patch.object(dist, "batch_isend_irecv", post):
                prepared = core.prepare(zigzag_cut(documents(), axis, dim=1), q.shape[2], q.shape[2], q.device)
                phases.append(mode.seen)
                mode.seen = []
                out = core(*leaves, prepared)
                phases.append(mode.seen)
                mode.seen = []
                torch.autograd.grad(out, leaves, grad)
                phases.append(mode.seen)
        found[method] = phases
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic_is_what_the_docstrings_say(gloo_ranks: GlooPool, dtype: torch.dtype) -> None:
    cp, element = 4, dtype.itemsize
    seq = ROW // cp
    kv_bytes = element * BATCH * 2 * seq * (8 + 8)
    ids = [("all_gather_into_tensor", 8 * BATCH * seq)]
    queries, answers = element * BATCH * seq * (8 * 8 + 4 * (8 + 8)), element * BATCH * seq * 8 * 8
    exchange = [("all_to_all_single", queries), ("all_to_all_single", answers)]
    kv, dkv = ("send", kv_bytes), ("send", kv_bytes * max(4, element) // element)
    expected = {
        "all_gather": [ids, [("all_gather_into_tensor", kv_bytes)], [("reduce_scatter_tensor", cp * kv_bytes)]],
        "ring": [ids, [kv] * (cp - 1), [kv, kv, dkv, kv, dkv, dkv]],
        "ulysses": [ids, exchange, exchange[::-1]],
    }
    assert gloo_ranks(cp, traffic, dtype) == [expected] * cp


class _Layer(torch.nn.Module):
    def __init__(self, core: LocalAttention) -> None:
        super().__init__()
        self.core = core

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Any) -> Tensor:
        return F.silu(self.core(q.sin(), k.cos(), v * 2, prepared)) + 1


def compiled_differences(world: World) -> list[float]:
    axis = cp_axis(world)
    found = []
    for method in METHODS:
        q, k, v, grad = (zigzag_cut(x, axis, dim=2) for x in whole_tensors(Case(method, True, 14)))
        core = context_attention(method, axis, Reference(), 14)  # type: ignore[arg-type]
        prepared = core.prepare(zigzag_cut(documents(), axis, dim=1), q.shape[2], q.shape[2], q.device)
        layer = _Layer(core)
        results = []
        for call in (layer, torch.compile(layer, backend="aot_eager")):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = call(*leaves, prepared)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
        found.append(max((x - y).abs().max().item() for x, y in zip(*results, strict=True)))
    torch._dynamo.reset()
    return found


def test_inside_a_compiled_block(gloo_ranks: GlooPool) -> None:
    for found in gloo_ranks(2, compiled_differences, timeout_s=120):
        assert max(found) <= 1e-6


def fake_axis(rank: int, size: int) -> Axis:
    return Axis(name="cp", size=size, rank=rank, ranks=tuple(range(size)), group=None)


def test_zigzag_gives_each_rank_an_early_and_a_late_chunk() -> None:
    assert zigzag_positions(16, fake_axis(1, 4)).tolist() == [2, 3, 12, 13]
    row = torch.arange(2 * 24).view(2, 24, 1)
    parts = [zigzag_cut(row, fake_axis(rank, 3), dim=1) for rank in range(3)]
    assert all(torch.equal(part[0, :, 0], zigzag_positions(24, fake_axis(r, 3))) for r, part in enumerate(parts))
    assert torch.equal(zigzag_join(parts, dim=1), row)


def gathered(world: World) -> Tensor:
    axis = cp_axis(world)
    return gather_rows(zigzag_cut(torch.arange(32).view(2, 16), axis, dim=1), axis, dim=1)


def test_rows_are_gathered_in_true_order(gloo_ranks: GlooPool) -> None:
    assert all(torch.equal(found, torch.arange(32).view(2, 16)) for found in gloo_ranks(4, gathered))


@pytest.mark.parametrize("window", [None, 5])
def test_ring_skips_what_nobody_sees(window: int | None) -> None:
    """Pairs computed over all steps: without a window each rank has the same, about half; with one hardly more than it."""
    size, row = 4, 1024
    pairs = []
    with patch.object(context_ring, "_TILE", 16):
        for rank in range(size):
            core = RingAttention(fake_axis(rank, size), window)
            pieces = itertools.chain(*core.prepare(None, row // size, row // size, torch.device("cpu")).pieces)
            pairs.append(sum((p.queries.stop - p.queries.start) * (p.keys.stop - p.keys.start) for p in pieces))
    if window is None:
        assert len(set(pairs)) == 1
        assert sum(pairs) <= (0.5 + 1 / size) * row**2
    else:
        assert sum(pairs) <= row * (16 + window)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ParallelError, match=r"no context method 'rign': .* \"all_gather\", \"ring\", \"ulysses\""):
        context_attention("rign", single_axis("cp"), Reference())  # type: ignore[arg-type]
    q, k = torch.zeros(1, 6, 4, 8), torch.zeros(1, 2, 4, 8)
    with pytest.raises(ParallelError, match=r'rank has 6 and parallel\.cp is 4: .* "ring" or "all_gather"'):
        UlyssesAttention(fake_axis(0, 4), Reference())(q, k, k, None)
    with pytest.raises(AssertionError, match="a row of 30 tokens does not fall into 4 equal chunks"):
        zigzag_positions(30, fake_axis(0, 2))
    assert isinstance(context_attention("all_gather", fake_axis(0, 2), Reference()), AllGatherAttention)
