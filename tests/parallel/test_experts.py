"""Experts spread over ranks against one rank that holds all of them: outputs, every gradient, and what travels.

Shape suffixes: T tokens of a rank, K experts of a token, D d_model, F expert width, E experts, L experts of a rank, R rows.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megamodel.model.config import MoEConfig
from megamodel.model.moe import Experts, Routing
from megamodel.model.seams import LocalExchange
from parallel.experts import ExpertExchange, SequenceShards, SideStream
from parallel.layout import Layout
from parallel.mesh import Mesh, single_axis
from parallel.world import World
from tests.gloo_pool import GlooPool
from tests.requirements import requires

D_MODEL, NUM_EXPERTS, D_FF, TOP_K = 8, 8, 16, 2
CONFIG = MoEConfig(num_experts=NUM_EXPERTS, top_k=TOP_K, d_ff=D_FF)
LAYOUTS = {2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2), (1, 4), (2, 1), (1, 2)]}  # world: (ep, expert_tp)
ROUTINGS = ["even", "one expert", "a rank without tokens", "one row in all"]
CASES = [(world, *degrees, routing) for world in LAYOUTS for degrees in LAYOUTS[world] for routing in ROUTINGS]


class Watched(Experts):
    """Experts that write down how many rows each of them works on. Rows of zeros count for nothing."""

    worked_on: Tensor

    def _grouped_swiglu(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        expert_R = torch.arange(len(counts_E)).repeat_interleave(counts_E, output_size=x_RD.shape[0])
        self.worked_on = torch.zeros_like(counts_E).scatter_add(0, expert_R, x_RD.detach().any(dim=1).long())
        return super()._grouped_swiglu(x_RD, counts_E)


def whole_experts(kind: type[Experts] = Watched) -> Experts:
    torch.manual_seed(0)
    experts = kind(D_MODEL, CONFIG, LocalExchange())
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return experts


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's tokens, their experts, and the gradient of the result."""

    x_TD: Tensor
    chosen_TK: Tensor
    gates_TK: Tensor
    grad_TD: Tensor


def batch_of(rank: int, routing: str, num_tokens: int | None = None) -> Batch:
    """A rank's batch: its own tokens, and unless given as many as no other rank has."""
    generator = torch.Generator().manual_seed(100 + rank)
    num_tokens, top_k = num_tokens or 5 + 3 * rank, TOP_K
    if routing == "a rank without tokens" and rank == 1:
        num_tokens = 0
    if routing == "one row in all":
        num_tokens, top_k = int(rank == 1), 1
    chosen_TK = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).topk(top_k, dim=-1).indices
    if routing == "one expert":
        chosen_TK = torch.full((num_tokens, 1), NUM_EXPERTS - 3)
    return Batch(
        x_TD=torch.randn(num_tokens, D_MODEL, generator=generator),
        chosen_TK=chosen_TK,
        gates_TK=torch.rand(chosen_TK.shape, generator=generator),
        grad_TD=torch.randn(num_tokens, D_MODEL, generator=generator),
    )


class Travel(TorchDispatchMode):
    """Bytes that this rank hands to each collective, in order, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional" and "wait" not in func.__name__:
            self.seen.append((func.__name__.split(".")[0], args[0].numel() * args[0].element_size()))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a rank has after forward and backward. `tensors`: result and gradients of what is its own; `weights`: gradients
    of its part of the weights, which lies in the whole at `part` = (ep coordinate, expert_tp coordinate)."""

    tensors: dict[str, Tensor]
    weights: dict[str, Tensor]
    part: tuple[int, int]
    worked_on: Tensor
    forward: list[tuple[str, int]]
    backward: list[tuple[str, int]]


def exchange_of(mesh: Mesh) -> ExpertExchange:
    return ExpertExchange(mesh.axis("ep"), mesh.axis("expert_tp"), mesh.axis("ep", "expert_tp"))


def part_of(w: Tensor, name: str, exchange: ExpertExchange) -> Tensor:
    width_dim = 1 if name == "w_down_EFD" else 2
    mine = w.chunk(exchange.ep.size)[exchange.ep.rank]
    return mine.chunk(exchange.expert_tp.size, dim=width_dim)[exchange.expert_tp.rank]


def spread_experts(exchange: ExpertExchange, kind: type[Experts] = Watched) -> Experts:
    experts = whole_experts(kind)
    experts.exchange = exchange
    for name, w in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(part_of(w.detach(), name, exchange).clone()))
    return experts


def run(experts: Experts, batch: Batch, watch: bool = True) -> Found:
    """One forward and backward. Nothing is compiled while `watch` sees what travels."""
    x_TD, gates_TK = batch.x_TD.clone().requires_grad_(), batch.gates_TK.clone().requires_grad_()
    there, back = Travel(), Travel()
    with there if watch else nullcontext():
        y_TD = experts(x_TD, Routing(batch.chosen_TK, gates_TK))
    with back if watch else nullcontext():
        y_TD.backward(batch.grad_TD)
    exchange = experts.exchange
    assert x_TD.grad is not None
    assert gates_TK.grad is not None
    return Found(
        tensors={"y": y_TD.detach(), "x": x_TD.grad, "gates": gates_TK.grad},
        weights={name: w.grad.clone() for name, w in experts.named_parameters() if w.grad is not None},
        part=(exchange.ep.rank, exchange.expert_tp.rank) if isinstance(exchange, ExpertExchange) else (0, 0),
        worked_on=experts.worked_on if isinstance(experts, Watched) else torch.empty(0),
        forward=there.seen,
        backward=back.seen,
    )


def run_all(world: World) -> dict[tuple[Any, ...], Found]:
    """Every layout and routing of a world, so that it is made once."""
    found = {}
    for ep, expert_tp in LAYOUTS[world.world_size]:
        mesh = Mesh(world, Layout(dp_shard=world.world_size, ep=ep, expert_tp=expert_tp))
        exchange = exchange_of(mesh)
        for routing in ROUTINGS:
            found[(world.world_size, ep, expert_tp, routing)] = run(
                spread_experts(exchange), batch_of(world.rank, routing)
            )
    return found


@pytest.fixture(scope="module")
def ranks(gloo_ranks: GlooPool) -> dict[tuple[Any, ...], list[Found]]:
    """What each rank found, by case."""
    of_world = {size: gloo_ranks(size, run_all) for size in LAYOUTS}
    return {case: [of_rank[case] for of_rank in of_world[case[0]]] for case in CASES}


def close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and float((found - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_of_tokens_are_those_of_one_rank(ranks: dict[Any, list[Found]], case: Any) -> None:
    for rank, found in enumerate(ranks[case]):
        expected = run(whole_experts(), batch_of(rank, case[3]))
        for name, tensor in expected.tensors.items():
            assert close(found.tensors[name], tensor), f"{name} on rank {rank}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_weights_sum_up_to_those_of_one_rank(ranks: dict[Any, list[Found]], case: Any) -> None:
    world, ep, expert_tp, routing = case
    experts = whole_experts()
    for rank in range(world):
        run(experts, batch_of(rank, routing))  # gradients of all ranks' tokens add up
    for name, w in experts.named_parameters():
        total = torch.zeros_like(w)
        for found in ranks[case]:
            width_dim = 1 if name == "w_down_EFD" else 2
            mine = total.chunk(ep)[found.part[0]].chunk(expert_tp, dim=width_dim)[found.part[1]]
            mine += found.weights[name]
        assert w.grad is not None
        assert close(total, w.grad), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_row_is_worked_on_once_by_each_part_of_its_expert(ranks: dict[Any, list[Found]], case: Any) -> None:
    world, ep, expert_tp, routing = case
    chosen = torch.cat([batch_of(rank, routing).chosen_TK.flatten() for rank in range(world)])
    worked_E = torch.zeros(expert_tp, ep, NUM_EXPERTS // ep, dtype=torch.int64)
    for found in ranks[case]:
        worked_E[found.part[1], found.part[0]] += found.worked_on
    for worked in worked_E.flatten(1):
        assert torch.equal(worked, torch.bincount(chosen, minlength=NUM_EXPERTS))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_collectives_and_bytes_follow_the_formulas(ranks: dict[Any, list[Found]], case: Any) -> None:
    _, _, expert_tp, routing = case
    width = 4 * D_MODEL
    for rank, found in enumerate(ranks[case]):
        routed = width * expert_tp * batch_of(rank, routing).chosen_TK.numel()
        worked_on = width * int(found.worked_on.sum())
        counts = 8 * NUM_EXPERTS * expert_tp
        assert found.forward == [("all_to_all_single", size) for size in (counts, routed, worked_on)]
        assert found.backward == [("all_to_all_single", size) for size in (routed, worked_on)]


def rows_that_say_where_they_belong(world: World) -> list[str]:
    """A round trip in bfloat16 where each row names its expert, its sender and its place; what is wrong, in words."""
    exchange = exchange_of(Mesh(world, Layout(dp_shard=4, ep=2, expert_tp=2)))
    counts_E = torch.tensor([3, 0, 2, 0, 7, 1, 0, 4]).roll(world.rank)
    experts_R = torch.arange(NUM_EXPERTS).repeat_interleave(counts_E)
    x_RD = torch.stack([experts_R, torch.full_like(experts_R, world.rank), torch.arange(len(experts_R))], dim=1)
    x_RD = x_RD.bfloat16().requires_grad_()
    x_MD, counts_L, handle = exchange.dispatch(x_RD, counts_E)
    y_RD = exchange.combine(x_MD, handle)
    y_RD.backward(x_RD.detach())
    wrong = []
    mine_L = torch.arange(NUM_EXPERTS).chunk(2)[exchange.ep.rank]
    if x_MD[:, 0].tolist() != mine_L.repeat_interleave(counts_L).tolist():
        wrong.append("rows do not lie with their expert")
    if [tuple(row) for row in x_MD.tolist()] != sorted(tuple(row) for row in x_MD.tolist()):
        wrong.append("rows of an expert do not lie in the order of their senders")
    if y_RD.dtype != torch.bfloat16 or not torch.equal(y_RD, 2 * x_RD):
        wrong.append("the sum over expert_tp is not twice the row")
    if x_RD.grad is None or not torch.equal(x_RD.grad, 2 * x_RD):
        wrong.append("the gradient is not the sum over expert_tp")
    return wrong


def test_bfloat16_rows_arrive_in_order_and_come_back_to_their_place(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(4, rows_that_say_where_they_belong) == [[]] * 4


def given_to_work_on(world: World) -> tuple[list[list[float]], list[int], list[list[float]]]:
    """Rows and counts where only rank 0 has a row, for an expert of rank 1; and what comes back of twice the rows, plus 1."""
    exchange = exchange_of(Mesh(world, Layout(dp_shard=2, ep=2)))
    x_RD = torch.full((1 - world.rank, 2), 5.0)
    x_MD, counts_L, handle = exchange.dispatch(x_RD, torch.tensor([0, 0, 1 - world.rank, 0]))
    return x_MD.tolist(), counts_L.tolist(), exchange.combine(2 * x_MD + 1, handle).tolist()


def test_who_receives_next_to_nothing_works_on_zeros_that_nobody_gets(gloo_ranks: GlooPool) -> None:
    idle, busy = gloo_ranks(2, given_to_work_on)
    assert idle == ([[0, 0], [0, 0]], [0, 2], [[11, 11]])
    assert busy == ([[5, 5], [0, 0]], [1, 1], [])


def test_one_rank_sends_nothing() -> None:
    alone = single_axis("alone")
    x_RD, counts_E = torch.randn(3, 4), torch.tensor([1, 2])
    with Travel() as travel:
        rows, counts, handle = ExpertExchange(alone, alone, alone).dispatch(x_RD, counts_E)
        back = ExpertExchange(alone, alone, alone).combine(rows, handle)
    assert back is rows is x_RD
    assert counts is counts_E
    assert travel.seen == []


def compiled_and_plain(world: World) -> tuple[list[str], list[int]]:
    """What differs between compiled and plain experts, over routings that give this rank ever other numbers of rows;
    and how many graphs had been made after each."""
    torch._dynamo.reset()
    exchange = exchange_of(Mesh(world, Layout(dp_shard=2, ep=2)))
    plain, compiled = spread_experts(exchange), spread_experts(exchange, Experts)
    compiled.forward = torch.compile(compiled.forward, backend="aot_eager", dynamic=False)  # type: ignore[method-assign]
    wrong, graphs, rows = [], [], set()
    for seed in range(5):
        batch = batch_of(2 * seed + world.rank, "even", num_tokens=9)
        expected, found = run(plain, batch), run(compiled, batch, watch=False)
        wrong += [name for name, tensor in expected.tensors.items() if not close(found.tensors[name], tensor)]
        wrong += [name for name, w in expected.weights.items() if not close(found.weights[name], w)]
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        rows.add(int(expected.worked_on.sum()))
    assert len(rows) > 2, "the test needs batches that differ"
    return wrong, graphs


def test_compiled_experts_are_the_same_and_are_compiled_once(gloo_ranks: GlooPool) -> None:
    for wrong, graphs in gloo_ranks(2, compiled_and_plain, timeout_s=120):
        assert wrong == []
        assert graphs[0] > 0
        assert set(graphs) == {graphs[0]}


def counts_of_shared_sequences(world: World) -> tuple[int, list[list[int]], list[list[int]]]:
    """Sums over cp * tp, and what `sum` left of its input."""
    mesh = Mesh(world, Layout(dp_shard=1, cp=2, tp=2))
    shards = SequenceShards(mesh.axis("cp", "tp"))
    counts_BE = torch.tensor([[1, 10, 100], [0, 0, 7]]) * (world.rank + 1)
    return shards.size, shards.sum(counts_BE).tolist(), counts_BE.tolist()


def test_counts_of_a_sequence_sum_over_the_ranks_that_share_it(gloo_ranks: GlooPool) -> None:
    for rank, (size, total, before) in enumerate(gloo_ranks(4, counts_of_shared_sequences)):
        assert size == 4
        assert total == [[10, 100, 1000], [0, 0, 70]]
        assert before == [[rank + 1, 10 * (rank + 1), 100 * (rank + 1)], [0, 0, 7 * (rank + 1)]]


def test_counts_of_a_whole_sequence_stay_as_they_are() -> None:
    counts = torch.tensor([[3, 4]])
    shards = SequenceShards(single_axis("cp"))
    assert shards.size == 1
    assert shards.sum(counts) is counts


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, requires("cuda")])])
def test_what_runs_beside_has_the_result_and_the_gradients_of_what_runs_in_order(device: str) -> None:
    """Large enough that a device which does not wait reads what is not there yet."""
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(512, 2048), nn.SiLU(), nn.Linear(2048, 512)).to(device)
    beside = SideStream(torch.device(device))
    x_TD = torch.randn(1024, 512, device=device)
    gradients = []
    for in_order in (True, False):
        leaf_TD = x_TD.clone().requires_grad_()
        before_TD = leaf_TD * 2
        handle = shared(before_TD) if in_order else beside.run(shared, before_TD)
        routed_TD = before_TD @ before_TD.detach().t() @ before_TD
        y_TD = routed_TD + (handle if in_order else beside.join(handle))
        found = torch.autograd.grad(y_TD.square().mean(), [leaf_TD, *shared.parameters()])
        gradients.append([y_TD.detach(), *found])
    for expected, found_beside in zip(*gradients, strict=True):
        torch.testing.assert_close(found_beside, expected)
