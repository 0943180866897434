"""DeepSpeed against plain AdamW in one process: losses, norms, weights and state, of a dense and an MoE decoder."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from megamodel.model.decoder import Block, Decoder
from parallel.config import DeepSpeedConfig
from parallel.deepspeed_engine import DeepSpeedParallel, EngineState, wrap_deepspeed
from parallel.errors import ParallelError
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.world import World
from tests.gloo_pool import GlooPool
from tests.megamodel.small import MOE, build, random_tokens, small_config
from tests.requirements import requires

pytestmark = requires("deepspeed")

NUM_RANKS = 2
BATCH, SEQ, MICRO = 12, 16, 2
MAX_NORM = 0.5
TIMEOUT = 200.0
"""Seconds. A rank's first use of DeepSpeed imports torch's compiler, which takes long on a busy machine."""
MODELS: dict[str, dict[str, Any]] = {"dense": {"tie_embeddings": True}, "moe": {"moe": MOE}}


@dataclass(frozen=True)
class Record:
    """What a run did: a (loss, norm) for each step, and all tensors after it."""

    figures: list[tuple[float, float]]
    state: EngineState


def decoder_of(kind: str) -> Decoder:
    return build(small_config(**MODELS[kind]))


def is_block(name: str, module: nn.Module) -> bool:
    return isinstance(module, Block)


def adamw(model: nn.Module) -> AdamW:
    named = list(model.named_parameters())
    matrices = [(name, p) for name, p in named if p.ndim > 1]
    vectors = [(name, p) for name, p in named if p.ndim == 1]
    return AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "lr": 3e-3}],
        lr=1e-2,
        # With 1e-8 rounding alone moves weights by 1.6e-5 (one process, the batch in one piece or in four).
        eps=1e-6,
        fused=True,
    )


def rows(model: Decoder, step: int) -> Tensor:
    return random_tokens(model.config, BATCH, SEQ + 1, seed=100 + step)


def loss_of(module: nn.Module, rows_BS: Tensor) -> Tensor:
    terms = module(rows_BS[:, :-1], rows_BS[:, 1:], None)
    loss: Tensor = (terms.token_loss_sum + terms.router_loss_sum) / (BATCH * SEQ)
    return loss


def factor_of(step: int) -> float:
    return 1.0 / (1 + step)


def train_plain(model: Decoder, optimizer: Optimizer, steps: range) -> Record:
    peaks = [group["lr"] for group in optimizer.param_groups]
    figures = []
    for step in steps:
        loss = loss_of(model, rows(model, step))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor_of(step)
        optimizer.step()
        optimizer.zero_grad()
        figures.append((loss.item(), norm.item()))
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak
    named = dict(model.named_parameters())
    return Record(
        figures,
        EngineState(
            model={name: p.detach().clone() for name, p in named.items()},
            optimizer={name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in named.items()},
        ),
    )


def wrap(world: World, model: Decoder, settings: dict[str, Any], **options: Any) -> DeepSpeedParallel:
    mesh = Mesh(world, Layout(dp_shard=world.world_size))
    config = DeepSpeedConfig(**settings)
    return wrap_deepspeed(model, mesh=mesh, config=config, optimizer=adamw(model), is_unit=is_block, **options)


def forward_backward(world: World, engine: DeepSpeedParallel, batch: Tensor, factor: float = 1.0) -> Tensor:
    """All micro steps of this rank's share of a batch; returns the global loss."""
    share = batch.view(world.world_size, -1, SEQ + 1)[world.rank]
    total = torch.zeros(())
    for index, micro_batch in enumerate(share.chunk(MICRO)):
        with engine.micro_step(is_last=index == MICRO - 1):
            loss = loss_of(engine.module, micro_batch)
            engine.backward(loss * factor)
        total += loss.detach()
    return world.all_reduce_sum(total)


def train_engine(world: World, engine: DeepSpeedParallel, steps: range) -> list[tuple[float, float]]:
    model = engine.model
    assert isinstance(model, Decoder)
    figures = []
    for step in steps:
        loss = forward_backward(world, engine, rows(model, step))
        norm = engine.clip_grad_norm(MAX_NORM)
        engine.step(factor_of(step))
        figures.append((loss.item(), norm.item()))
    return figures


def run(
    world: World, kind: str, settings: dict[str, Any], steps: range, start: EngineState | None = None, **options: Any
) -> Record:
    engine = wrap(world, decoder_of(kind), settings, **options)
    if start is not None:
        engine.import_state(start)
    record = Record(train_engine(world, engine, steps), engine.export_state())
    engine.close()
    return record


def joined(records: list[Record]) -> EngineState:
    """All ranks' shares; no name is in two."""
    model: dict[str, Tensor] = {}
    optimizer: dict[str, Any] = {}
    for record in records:
        assert not model.keys() & record.state.model.keys()
        model.update(record.state.model)
        optimizer.update(record.state.optimizer)
    return EngineState(model=model, optimizer=optimizer)


def assert_same(found: EngineState, expected: EngineState) -> None:
    """Weights to 1e-5. Moments hold the last gradient, which small differences of the weights before it reach undamped."""
    assert found.model.keys() == expected.model.keys()
    assert found.optimizer.keys() == expected.optimizer.keys()
    for name, weight in expected.model.items():
        pairs = {"": (found.model[name], weight)}
        pairs |= {entry: (found.optimizer[name][entry], value) for entry, value in expected.optimizer[name].items()}
        for entry, (one, other) in pairs.items():
            assert one.shape == other.shape, (name, entry)
            error = ((one - other).norm() / other.norm().clamp(min=1e-30)).item()
            assert error <= (1e-4 if entry else 1e-5), f"{name} {entry}: relative error {error:.1e}"


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_is_that_of_plain_adamw_in_one_process(gloo_ranks: GlooPool, stage: int, kind: str) -> None:
    model = decoder_of(kind)
    expected = train_plain(model, adamw(model), range(5))
    assert max(norm for _, norm in expected.figures) > MAX_NORM, "clipping has nothing to do"
    records = gloo_ranks(NUM_RANKS, run, kind, {"zero_stage": stage}, range(5), timeout_s=TIMEOUT)
    assert records[0].figures == records[1].figures
    torch.testing.assert_close(torch.tensor(records[0].figures), torch.tensor(expected.figures), rtol=1e-5, atol=0)
    assert_same(joined(records), expected.state)


def whole_state(world: World, engine: DeepSpeedParallel) -> EngineState:
    return joined([Record([], state) for state in world.all_gather_object(engine.export_state())])


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_goes_on_under_deepspeed_and_back(gloo_ranks: GlooPool, stage: int) -> None:
    model = decoder_of("moe")
    optimizer = adamw(model)
    begun = train_plain(model, optimizer, range(2))
    expected = train_plain(model, optimizer, range(2, 6))
    # Two steps in one process, two under DeepSpeed on three ranks (uneven shards), and two more in one process.
    middle = joined(gloo_ranks(3, run, "moe", {"zero_stage": stage}, range(2, 4), begun.state, timeout_s=TIMEOUT))
    back = decoder_of("moe")
    optimizer = adamw(back)
    with torch.no_grad():
        for name, parameter in back.named_parameters():
            parameter.copy_(middle.model[name])
            optimizer.state[parameter].update(middle.optimizer[name])
    found = train_plain(back, optimizer, range(4, 6))
    torch.testing.assert_close(torch.tensor(found.figures), torch.tensor(expected.figures[2:]), rtol=1e-5, atol=0)
    assert_same(found.state, expected.state)


def bad_steps(world: World, settings: dict[str, Any]) -> tuple[list[float], bool, list[tuple[float, float]]]:
    """Norms of a NaN gradient and of a good one that is discarded; whether weights stayed; and the steps after."""
    model = decoder_of("moe")
    engine = wrap(world, model, settings)
    train_engine(world, engine, range(1))
    before = whole_state(world, engine)
    forward_backward(world, engine, rows(model, 7), factor=float("nan") if world.rank == 1 else 1.0)
    norms = [engine.clip_grad_norm(MAX_NORM).item()]
    engine.step(1.0)
    forward_backward(world, engine, rows(model, 8))
    norms.append(engine.clip_grad_norm(MAX_NORM).item())
    engine.discard()
    after = whole_state(world, engine)
    same = all(torch.equal(after.model[name], weight) for name, weight in before.model.items())
    for name, entries in before.optimizer.items():
        same = same and all(torch.equal(after.optimizer[name][entry], value) for entry, value in entries.items())
    figures = train_engine(world, engine, range(1, 3))
    engine.close()
    return norms, same, figures


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_is_not_taken_leaves_no_trace(gloo_ranks: GlooPool, stage: int, offload: str) -> None:
    model = decoder_of("moe")
    expected = train_plain(model, adamw(model), range(3))
    norms, same, figures = gloo_ranks(
        NUM_RANKS, bad_steps, {"zero_stage": stage, "offload_optimizer": offload}, timeout_s=TIMEOUT
    )[0]
    assert norms[0] != norms[0], "the norm of a NaN gradient"
    assert norms[1] > 0
    assert same
    torch.testing.assert_close(torch.tensor(figures), torch.tensor(expected.figures[1:]), rtol=1e-5, atol=0)


def test_parameters_and_state_in_cpu_memory(gloo_ranks: GlooPool) -> None:
    model = decoder_of("dense")
    expected = train_plain(model, adamw(model), range(3))
    settings = {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}
    records = gloo_ranks(NUM_RANKS, run, "dense", settings, range(3), timeout_s=TIMEOUT)
    torch.testing.assert_close(torch.tensor(records[0].figures), torch.tensor(expected.figures), rtol=1e-5, atol=0)
    assert_same(joined(records), expected.state)


def run_bf16(world: World, stage: int, steps: range) -> tuple[list[tuple[float, float]], set[torch.dtype], EngineState]:
    model = decoder_of("moe")
    model.compute_dtype = torch.bfloat16
    engine = wrap(world, model, {"zero_stage": stage}, compute_dtype=torch.bfloat16)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    start = engine.export_state()
    figures = train_engine(world, engine, steps)
    engine.close()
    return figures, dtypes, start


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_compute_keeps_fp32_masters(gloo_ranks: GlooPool, stage: int) -> None:
    model = decoder_of("moe")
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = train_plain(model, adamw(model), range(5))
    answers = gloo_ranks(NUM_RANKS, run_bf16, stage, range(5), timeout_s=TIMEOUT)
    figures, dtypes, _ = answers[0]
    assert dtypes == {torch.bfloat16 if stage > 1 else torch.float32}
    masters = {name: weight for _, _, state in answers for name, weight in state.model.items()}
    found, wanted = torch.tensor(figures), torch.tensor(expected.figures)
    torch.testing.assert_close(found[:, 0], wanted[:, 0], rtol=2e-2, atol=0)
    assert not torch.equal(found, wanted)
    assert all(torch.equal(masters[name], weight) for name, weight in initial.items())


def refusals(world: World) -> list[str]:
    mesh = Mesh(world, Layout(dp_shard=world.world_size))
    model = decoder_of("dense")
    with torch.device("meta"):
        on_meta = Decoder(model.config)
    split = Mesh(world, Layout(tp=world.world_size))
    attempts: list[dict[str, Any]] = [
        {"model": model, "mesh": mesh, "optimizer": torch.optim.SGD(model.parameters())},
        {"model": on_meta, "mesh": mesh, "optimizer": adamw(on_meta)},
        {"model": model, "mesh": split, "optimizer": adamw(model)},
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises(ParallelError) as caught:
            wrap_deepspeed(**attempt, config=DeepSpeedConfig())
        messages.append(str(caught.value))
    engine = wrap(world, model, {"zero_stage": 2})
    good = EngineState(
        model={name: torch.zeros_like(p) for name, p in model.named_parameters()},
        optimizer={
            name: {"exp_avg": torch.zeros_like(p), "step": torch.ones(())} for name, p in model.named_parameters()
        },
    )
    last = list(good.model)[-1]
    for odd in ({"step": torch.ones(())}, {"exp_avg": good.model[last], "step": torch.tensor(2.0)}):
        with pytest.raises(ParallelError) as caught:
            engine.import_state(EngineState(model=good.model, optimizer={**good.optimizer, last: odd}))
        messages.append(str(caught.value))
    engine.close()
    return messages


def test_what_deepspeed_cannot_do_is_refused(gloo_ranks: GlooPool) -> None:
    optimizer, meta, layout, entries, steps = gloo_ranks(2, refusals, timeout_s=TIMEOUT)[0]
    assert "only AdamW may step that, not SGD" in optimizer
    assert "on meta" in meta
    assert "data and context parallelism only" in layout
    assert "one rule" in entries
    assert "counts [1.0, 2.0] steps" in steps


def traces(world: World) -> tuple[str, list[str]]:
    """What a run of five steps writes to the console, and what of this process it leaves changed."""
    watched: dict[str, Any] = {
        "F.linear": lambda: F.linear,
        "Module.__init__": lambda: nn.Module.__init__,
        "Module.apply": lambda: nn.Module.apply,
        "torch.empty": lambda: torch.empty,
        "environment": lambda: dict(os.environ),
        "root logger": lambda: list(logging.getLogger().handlers),
        "default dtype": torch.get_default_dtype,
    }
    before = {name: read() for name, read in watched.items()}
    with tempfile.TemporaryFile() as console, contextlib.ExitStack() as back:
        sys.stdout.flush()
        for stream in (1, 2):
            kept = os.dup(stream)
            back.callback(os.close, kept)
            back.callback(os.dup2, kept, stream)
            os.dup2(console.fileno(), stream)
        run(world, "moe", {"zero_stage": 3}, range(2))
        sys.stdout.flush()
        console.seek(0)
        written = console.read().decode()
    return written, [name for name, read in watched.items() if read() != before[name]]


def test_it_is_quiet_and_leaves_nothing_behind(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(NUM_RANKS, traces, timeout_s=TIMEOUT) == [("", [])] * NUM_RANKS


def validate(world: World, stage: int) -> list[float]:
    """Losses without gradients before, between and after steps; the steps' own are as if there were none."""
    model = decoder_of("moe")
    engine = wrap(world, model, {"zero_stage": stage})
    losses = []
    for step in range(2):
        with torch.no_grad():
            model.eval()
            losses.append(loss_of(engine.module, rows(model, 50)).item())
            model.train()
        losses.append(train_engine(world, engine, range(step, step + 1))[0][0])
    engine.close()
    return losses


@pytest.mark.parametrize("stage", [2, 3])
def test_validation_between_steps(gloo_ranks: GlooPool, stage: int) -> None:
    model = decoder_of("moe")
    optimizer = adamw(model)
    expected = []
    for step in range(2):
        with torch.no_grad():
            expected.append(loss_of(model, rows(model, 50)).item())
        expected.append(train_plain(model, optimizer, range(step, step + 1)).figures[0][0])
    found = gloo_ranks(NUM_RANKS, validate, stage, timeout_s=TIMEOUT)[1]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)
