"""One step: equal on any number of ranks and any cut into micro batches; nothing is updated from a bad gradient."""

from __future__ import annotations

import math

import pytest
import torch

from megamodel.model.initialization import initial_value
from megamodel.train.batch import TokenBatch
from megamodel.train.build import BuiltModel, build_model, compute_dtype, materialize
from megamodel.train.config import OptimizerConfig, TrainConfig
from megamodel.train.optimizer import build_optimizers
from megamodel.train.step import StepResult, TrainStep
from parallel.checkpoint.staging import local_part
from parallel.config import ParallelConfig
from parallel.world import World
from tests.gloo_pool import GlooPool
from tests.megamodel.small import MOE, random_tokens, small_config
from tests.parallel.models import flat_mesh

CONFIG = small_config(
    num_layers=3, tie_embeddings=True, moe={**MOE, "first_layer": 1, "z_loss_weight": 0.01, "aux_loss_weight": 0.1}
)
BIAS_CONFIG = small_config(moe={**MOE, "balance": "bias", "num_shared_experts": 1, "router_score": "sigmoid"})
ROWS, SEQ = 12, 16


def global_batch(step: int) -> TokenBatch:
    """Twelve packed rows whose numbers of labels differ: a mean of means would not be the mean."""
    tokens = random_tokens(CONFIG, ROWS, SEQ + 1, seed=step)
    labels = tokens[:, 1:].clone()
    for row in range(ROWS):
        labels[row, : row % 7] = -100
    documents = (torch.arange(SEQ)[None, :] >= torch.arange(ROWS)[:, None]).int()
    return TokenBatch(tokens_BS=tokens[:, :-1], labels_BS=labels, document_ids_BS=documents)


def share(batch: TokenBatch, world: World, micro: int) -> list[TokenBatch]:
    """This rank's micro batches."""
    assert batch.document_ids_BS is not None
    rows = torch.arange(ROWS).chunk(world.world_size)[world.rank].split(micro)
    return [
        TokenBatch(
            tokens_BS=batch.tokens_BS[part],
            labels_BS=batch.labels_BS[part],
            document_ids_BS=batch.document_ids_BS[part],
        )
        for part in rows
    ]


def make(world: World, engine: str, optimizer: str, model_config=CONFIG) -> tuple[BuiltModel, TrainStep]:
    train = TrainConfig(precision="fp32", compile="off")
    built = build_model(
        model_config, train, ParallelConfig(data_engine=engine), mesh=flat_mesh(world), seed=3, seq_len=SEQ
    )
    optimizers = build_optimizers(
        built.data_parallel.parameters(), OptimizerConfig(name=optimizer, lr=1e-2), compute_dtype("fp32"), built.mesh
    )
    step = TrainStep(built, optimizers, max_norm=1.0)
    return built, step


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def three_steps(world: World, engine: str, optimizer: str, micro: int, biased: bool) -> dict:
    """Losses, gradient norms, every gradient of the first step, and the weights after three."""
    built, step = make(world, engine, optimizer, BIAS_CONFIG if biased else CONFIG)
    gradients: dict[str, torch.Tensor] = {}
    update = step.optimizers.step

    def keep_gradients(factor: float) -> None:
        if not gradients:
            for name, parameter in built.decoder.named_parameters():
                assert parameter.grad is not None, name
                gradients[name] = whole(parameter.grad)
        update(factor)

    step.optimizers.step = keep_gradients  # type: ignore[method-assign]
    results: list[StepResult] = [
        step(share(global_batch(number), world, micro), lr_factor=1.0, stop_requested=lambda: False)
        for number in range(3)
    ]
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "router_losses": [result.router.loss for result in results if result.router],
        "counts": [result.router.counts_LE.tolist() for result in results if result.router],
        "gradients": gradients,
        "weights": {name: whole(tensor) for name, tensor in built.decoder.state_dict().items()},
    }


@pytest.fixture(scope="module")
def reference(gloo_ranks: GlooPool):
    """One rank, all rows at once; made once for each optimizer and router."""
    made: dict = {}

    def get(optimizer: str, biased: bool) -> dict:
        key = (optimizer, biased)
        if key not in made:
            made[key] = gloo_ranks(1, three_steps, "ddp", optimizer, ROWS, biased)[0]
        return made[key]

    return get


@pytest.mark.parametrize(
    ("ranks", "engine", "optimizer", "micro", "biased"),
    [
        (1, "ddp", "adamw", 3, False),
        (2, "ddp", "adamw", 6, False),
        (2, "ddp", "muon", 2, True),
        (3, "ddp", "muon", 4, False),
        (2, "fsdp2", "adamw", 3, True),
        (3, "fsdp2", "muon", 2, False),
        (2, "fsdp2", "muon", 6, True),
    ],
)
def test_any_layout_equals_one_rank(
    gloo_ranks: GlooPool, reference, ranks: int, engine: str, optimizer: str, micro: int, biased: bool
) -> None:
    expected = reference(optimizer, biased)
    for got in gloo_ranks(ranks, three_steps, engine, optimizer, micro, biased):
        assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert got["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert got["router_losses"] == pytest.approx(expected["router_losses"], rel=1e-5)
        assert got["counts"] == expected["counts"]
        for name, gradient in expected["gradients"].items():
            difference = (got["gradients"][name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
            assert difference <= 1e-4, name
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(got["weights"][name], weight, rtol=1e-3, atol=2e-4, msg=name)


def initial_shards(world: World, engine: str) -> bool:
    built, _ = make(world, engine, "adamw")
    return all(
        torch.equal(whole(tensor), initial_value(name, tensor.shape, CONFIG, 3))
        for name, tensor in built.decoder.state_dict().items()
        if name != "lm_head.weight"
    )


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_initial_weights_are_bit_equal_in_every_layout(gloo_ranks: GlooPool, engine: str) -> None:
    assert all(gloo_ranks(3, initial_shards, engine))


def poisoned_step(world: World) -> tuple[list[bool], bool]:
    """A NaN that only the last rank sees; then a good step."""
    built, step = make(world, "ddp", "muon", BIAS_CONFIG)
    before = {name: tensor.clone() for name, tensor in built.decoder.state_dict().items()}
    batches = share(global_batch(0), world, 6)
    forward = built.data_parallel.module.forward
    if world.rank == world.world_size - 1:

        def poisoned(*args, **kwargs):
            terms = forward(*args, **kwargs)
            return terms._replace(token_loss_sum=terms.token_loss_sum * math.nan)

        built.data_parallel.module.forward = poisoned  # type: ignore[method-assign]
    bad = step(batches, lr_factor=1.0, stop_requested=lambda: False)
    unchanged = all(torch.equal(tensor, before[name]) for name, tensor in built.decoder.state_dict().items())
    built.data_parallel.module.forward = forward  # type: ignore[method-assign]
    good = step(batches, lr_factor=1.0, stop_requested=lambda: False)
    return [bad.skipped, good.skipped], unchanged


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(2, poisoned_step) == [([True, False], True)] * 2


def stop_on_last_rank(world: World) -> bool:
    _, step = make(world, "ddp", "adamw")
    batch = share(global_batch(0), world, 6)
    return step(batch, lr_factor=1.0, stop_requested=lambda: world.rank == world.world_size - 1).stop_requested


def test_a_stop_asked_of_one_rank_reaches_all(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(2, stop_on_last_rank) == [True, True]


def bf16_losses(world: World, engine: str, precision: str) -> list[float]:
    train = TrainConfig(precision=precision, compile="off")
    built = build_model(CONFIG, train, ParallelConfig(data_engine=engine), mesh=flat_mesh(world), seed=3, seq_len=SEQ)
    optimizers = build_optimizers(
        built.data_parallel.parameters(), OptimizerConfig(name="adamw", lr=1e-3), compute_dtype(precision), built.mesh
    )
    step = TrainStep(built, optimizers, max_norm=1.0)
    assert all(local_part(parameter).dtype == torch.float32 for parameter in built.decoder.parameters())
    return [step(share(global_batch(0), world, 6), lr_factor=1.0, stop_requested=lambda: False).loss for _ in range(10)]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_bf16_keeps_float32_weights_and_follows_fp32(gloo_ranks: GlooPool, engine: str) -> None:
    exact = gloo_ranks(2, bf16_losses, engine, "fp32")[0]
    rounded = gloo_ranks(2, bf16_losses, engine, "bf16")[0]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=5e-3)
    assert rounded[-1] < rounded[0] - 0.05


def bf16_gradients(world: World, engine: str, optimizer: str) -> dict[str, torch.Tensor]:
    """Gradients of norms and routers in bf16, and the router's weights after a step."""
    train = TrainConfig(precision="bf16", compile="off")
    built = build_model(CONFIG, train, ParallelConfig(data_engine=engine), mesh=flat_mesh(world), seed=3, seq_len=SEQ)
    optimizers = build_optimizers(
        built.data_parallel.parameters(), OptimizerConfig(name=optimizer, lr=1e-3), compute_dtype("bf16"), built.mesh
    )
    step = TrainStep(built, optimizers, max_norm=1e9)
    kept = {}
    update = step.optimizers.step

    def keep(factor: float) -> None:
        small = {n: p for n, p in built.decoder.named_parameters() if n.endswith(("norm.weight", "router.weight"))}
        kept.update({name: whole(p.grad) for name, p in small.items() if p.grad is not None})
        update(factor)
        kept.update({f"{name} after": whole(p) for name, p in small.items()})

    step.optimizers.step = keep  # type: ignore[method-assign]
    step(share(global_batch(0), world, 6), lr_factor=1.0, stop_requested=lambda: False)
    return kept


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_both_engines_treat_norms_and_routers_alike_in_bf16(gloo_ranks: GlooPool, optimizer: str) -> None:
    replicated = gloo_ranks(2, bf16_gradients, "ddp", optimizer)[0]
    sharded = gloo_ranks(2, bf16_gradients, "fsdp2", optimizer)
    assert any("router" in name for name in replicated)
    for name, expected in replicated.items():
        assert torch.equal(sharded[0][name], sharded[1][name]), name
        assert (sharded[0][name] - expected).norm() / expected.norm() < 1e-4, name


def rotary_dtype(world: World) -> torch.dtype:
    train = TrainConfig(precision="bf16", compile="off")
    built = build_model(CONFIG, train, ParallelConfig(data_engine="fsdp2"), mesh=flat_mesh(world), seed=3, seq_len=SEQ)
    seen: list[torch.dtype] = []
    attention = built.decoder.layers["0"].attention
    attention.register_forward_pre_hook(lambda module, args: seen.append(args[1].dtype))
    built.data_parallel.module(global_batch(0).tokens_BS)
    return seen[0]


def test_sharding_in_bf16_does_not_round_positions(gloo_ranks: GlooPool) -> None:
    assert gloo_ranks(2, rotary_dtype) == [torch.float32] * 2


def test_materialize_fills_buffers_too() -> None:
    from megamodel.model.decoder import Decoder

    with torch.device("meta"):
        decoder = Decoder(BIAS_CONFIG)
    materialize([decoder], torch.device("cpu"), BIAS_CONFIG, 0, {})
    assert all(not tensor.is_meta and torch.isfinite(tensor).all() for tensor in decoder.state_dict().values())
