"""The same twenty steps under any layout and on one rank: losses, every gradient, norms and weights, side by side.

What a rank holds comes back in pieces of the whole; pieces that several ranks hold must be equal, and together they must
cover every tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megamodel.train.assemble import assemble
from megamodel.train.batch import TokenBatch
from megamodel.train.config import TrainConfig
from megamodel.train.step import TrainStep
from parallel.config import ParallelConfig
from parallel.layout import resolve_layout
from parallel.mesh import Mesh
from parallel.placement import piece_of
from parallel.world import World
from tests.megamodel.small import small_config

SEQ_LEN = 32
GLOBAL_BATCH = 8
MOE = {"num_experts": 4, "top_k": 2, "d_ff": 32, "num_shared_experts": 1, "every": 2, "z_loss_weight": 1e-3}
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "num_layers": 4,
    "d_model": 32,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 64,
    "init_std": 0.1,
}

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
NORM_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 1e-4
NEAREST_TIE = 2e-6


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run: `parallel`, `train` and `model` are settings of these sections; `ranks` of them share it."""

    ranks: int = 1
    moe: bool = True
    parallel: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    packed: bool = True
    steps: int = 20
    seed: int = 0

    def seeded(self, seed: int) -> Case:
        """With other batches."""
        return replace(self, seed=seed)

    def alone(self) -> Case:
        """The same run on one rank, compiled or not as the case is."""
        kept = {key: value for key, value in self.parallel.items() if key == "param_dtype"}
        return Case(
            moe=self.moe,
            parallel=kept,
            train={
                key: value for key, value in self.train.items() if key not in ("micro_batch_size", "activation_memory")
            },
            model=self.model,
            packed=self.packed,
            steps=self.steps,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one rank saw. Gradients are those of step 1, before clipping; pieces are (offsets, whole shape, values).

    `nearest_tie`: the least lead, over all tokens, layers and steps, of an expert that was chosen over the first that was not.
    """

    losses: list[float]
    norms: list[float]
    first_weights: dict[str, list[Any]]
    gradients: dict[str, list[Any]]
    weights: dict[str, list[Any]]
    nearest_tie: float


def global_batch(case: Case, step: int, vocab_size: int) -> TokenBatch:
    """Eight rows of random ids; a tenth of the labels are void; packed rows are of documents of random lengths."""
    generator = torch.Generator().manual_seed(1000 * case.seed + step)
    tokens = torch.randint(0, vocab_size, (GLOBAL_BATCH, SEQ_LEN + 1), generator=generator)
    labels = tokens[:, 1:].masked_fill(torch.rand(GLOBAL_BATCH, SEQ_LEN, generator=generator) < 0.1, -100)
    documents = (torch.rand(GLOBAL_BATCH, SEQ_LEN, generator=generator) < 0.1).cumsum(dim=1)
    return TokenBatch(
        tokens_BS=tokens[:, :-1], labels_BS=labels, document_ids_BS=documents.int() if case.packed else None
    )


def run_case(world: World, case: Case) -> Trace:
    """One rank's part of a case."""
    config = small_config(**{**SHAPE, **({"moe": MOE} if case.moe else {}), **case.model})
    train = TrainConfig(
        **{
            "precision": "fp32",
            "compile": "off",
            "global_batch_size": GLOBAL_BATCH,
            "clip_grad_norm": 0.5,
            "optimizer": {"lr": 1e-3, "eps": 1e-5},
            **case.train,
        }
    )
    parallel = ParallelConfig(**case.parallel)
    mesh = Mesh(world, resolve_layout(parallel, world.world_size))
    assembled = assemble(config, train, parallel, mesh=mesh, seed=5, seq_len=SEQ_LEN)
    built = assembled.built
    step = TrainStep(built, assembled.optimizers, max_norm=train.clip_grad_norm)
    first_weights = _pieces(built, lambda parameter: parameter)
    gradients: dict[str, list[Any]] = {}
    clip = built.data_parallel.clip_grad_norm

    def observe(max_norm: float) -> Tensor:
        if not gradients:
            gradients.update(_pieces(built, lambda parameter: parameter.grad))
        return clip(max_norm)

    built.data_parallel.clip_grad_norm = observe  # type: ignore[method-assign]
    leads = _watch_leads(built)
    losses, norms = [], []
    for number in range(case.steps):
        rows = GLOBAL_BATCH // mesh.layout.num_data_ranks
        batch = global_batch(case, number, config.vocab_size).share(mesh.axis("cp"))
        mine = batch.rows(slice(mesh.data_rank * rows, (mesh.data_rank + 1) * rows))
        size = built.micro_batch_size
        micro_batches = [mine.rows(slice(start, start + size)) for start in range(0, rows, size)]
        result = step(micro_batches, lr_factor=1.0, stop_requested=lambda: False)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return Trace(
        losses=losses,
        norms=norms,
        first_weights=first_weights,
        gradients=gradients,
        weights=_pieces(built, lambda parameter: parameter),
        nearest_tie=min(map(float, leads), default=1.0),
    )


def _watch_leads(built: Any) -> list[Tensor]:
    """Fills with each router's least lead as the model runs."""
    leads: list[Tensor] = []

    @torch.no_grad()
    def watch(router: Any, args: Any, result: Any) -> None:
        logits = torch.nn.functional.linear(args[0].float(), router.weight.float())
        affinity = logits.softmax(-1) if router.config.router_score == "softmax" else logits.sigmoid()
        if router.balance_bias is not None:
            affinity = affinity + router.balance_bias
        top = affinity.topk(router.config.top_k + 1, dim=-1).values
        leads.append((top[..., -2] - top[..., -1]).min())

    for part in built.parts:
        for _, moe in part.moe_layers():
            moe.router.register_forward_hook(watch)
    return leads


def _pieces(built: Any, of: Any) -> dict[str, list[Any]]:
    found = {}
    for placed in built.data_parallel.parameters():
        tensor = of(placed.parameter)
        if tensor is not None:
            piece = piece_of(tensor, placed.placement)
            found[placed.name] = [piece.offsets, tuple(piece.shape), piece.local.clone()]
    return found


def whole_tensors(parts: list[dict[str, list[Any]]]) -> dict[str, Tensor]:
    """Puts every rank's pieces together; copies must be equal to the last bit, and nothing may be missing."""
    wholes: dict[str, Tensor] = {}
    for part in parts:
        for name, (offsets, shape, values) in part.items():
            whole = wholes.setdefault(name, torch.full(shape, float("nan")))
            box = tuple(slice(at, at + size) for at, size in zip(offsets, values.shape, strict=True))
            there = whole[box]
            known = ~there.isnan()
            assert torch.equal(there[known], values.float()[known]), f"{name}: ranks hold different copies"
            whole[box] = values.float()
    for name, whole in wholes.items():
        assert not whole.isnan().any(), f"{name}: no rank holds some of it"
    return wholes


def alone_without_ties(run_alone: Any, case: Case) -> tuple[Case, Trace]:
    """The case, and its run on one rank, with the first seed under which no token is near a tie between two experts.

    There rounding, which no layout shares with another, would decide where a token goes, and all later steps would differ.
    """
    while True:
        trace = run_alone(case.alone())
        if trace.nearest_tie >= NEAREST_TIE:
            return case, trace
        case = replace(case, seed=case.seed + 1)


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found - expected).double().norm() / expected.double().norm().clamp_min(1e-12))


def compare(traces: list[Trace], alone: Trace) -> list[str]:
    """Everything in which a layout differs from one rank by more than the tolerances of docs/parallelism.md."""
    problems = []
    first = traces[0]
    if any(trace.losses != first.losses or trace.norms != first.norms for trace in traces):
        problems.append("ranks disagree on the losses or the norms")
    for kind, found, expected, tolerance in (
        ("loss", first.losses, alone.losses, LOSS_TOLERANCE),
        ("gradient norm", first.norms, alone.norms, NORM_TOLERANCE),
    ):
        for step, (here, there) in enumerate(zip(found, expected, strict=True), start=1):
            if not abs(here - there) <= tolerance * abs(there):
                problems.append(f"{kind} of step {step}: {here!r}, alone {there!r}")
                break
    expected_first = whole_tensors([alone.first_weights])
    for name, whole in whole_tensors([trace.first_weights for trace in traces]).items():
        if not torch.equal(whole, expected_first[name]):
            problems.append(f"initial weights of {name} differ")
    for kind, tolerance in (("gradients", GRADIENT_TOLERANCE), ("weights", WEIGHT_TOLERANCE)):
        wholes = whole_tensors([getattr(trace, kind) for trace in traces])
        expected_wholes = whole_tensors([getattr(alone, kind)])
        if wholes.keys() != expected_wholes.keys():
            problems.append(f"{kind}: {sorted(wholes.keys() ^ expected_wholes.keys())} on one side only")
            continue
        for name, whole in wholes.items():
            if not (error := relative(whole, expected_wholes[name])) <= tolerance:
                problems.append(f"{kind} of {name}: relative error {error:.1e}")
    return problems
