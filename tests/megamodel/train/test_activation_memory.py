"""What a block keeps for its backward changes memory, never gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from megamodel.model.decoder import Decoder, Seams
from megamodel.model.rope import rotary_table
from megamodel.model.seams import ScaledDotProduct
from megamodel.train.activation_memory import apply_activation_memory, offload_of
from megamodel.train.activation_offload import ActivationOffload
from megamodel.train.build import compile_blocks
from megamodel.train.config import ActivationMemoryConfig
from parallel.collectives import all_gather, reduce_scatter
from parallel.mesh import Axis
from tests.megamodel.small import MLA, MOE, build, random_tokens, small_config
from tests.requirements import requires

MODES: list[dict[str, Any]] = [
    {"mode": "selective"},
    {"mode": "selective", "save": ("attention",)},
    {"mode": "full"},
    {"mode": "full", "every_n_layers": 2},
    {"mode": "offload"},
]
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {"qk_norm": True},
    "moe": {"moe": {**MOE, "first_layer": 1, "num_shared_experts": 1, "z_loss_weight": 0.01}},
    "mla": {"mla": MLA},
}


class Count(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def gradients(decoder: Decoder, *, documents: bool = True) -> dict[str, Tensor]:
    tokens = random_tokens(decoder.config, 2, 17)
    document_ids = (torch.arange(16) >= 9).int().expand(2, -1) if documents else None
    terms = decoder(tokens[:, :-1], tokens[:, 1:], document_ids)
    (terms.token_loss_sum + terms.router_loss_sum).backward()
    return {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}


def applied(decoder: Decoder, settings: dict[str, Any], **options: Any) -> ActivationOffload | None:
    apply_activation_memory(decoder, ActivationMemoryConfig(**settings), **options)
    offload = offload_of(decoder)
    if offload is not None:
        offload.smallest_bytes = 0
    return offload


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", MODES, ids=str)
def test_gradients_are_those_of_keeping_everything(shape: str, settings: dict[str, Any]) -> None:
    config = small_config(num_layers=3, **SHAPES[shape])
    expected = gradients(build(config))
    decoder = build(config)
    applied(decoder, settings)
    actual = gradients(decoder)
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(actual[name], grad), name


def products(settings: dict[str, Any], shape: str = "dense") -> dict[str, int]:
    decoder = build(small_config(num_layers=2, **SHAPES[shape]))
    applied(decoder, settings)
    with Count() as count:
        gradients(decoder, documents=False)
    return count.calls


def test_full_repeats_the_products_of_each_nth_block_and_selective_repeats_none() -> None:
    plain = products({"mode": "none"})["aten::mm"]
    every = products({"mode": "full"})["aten::mm"]
    second = products({"mode": "full", "every_n_layers": 2})["aten::mm"]
    assert every - plain == 2 * (second - plain) > 0
    assert products({"mode": "selective"})["aten::mm"] == plain
    assert products({"mode": "selective", "save": ("attention",)})["aten::mm"] == every


def test_selective_keeps_attention_and_products_of_experts() -> None:
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    experts = "mega::grouped_mm"
    plain, kept = products({"mode": "none"}, "moe"), products({"mode": "selective"}, "moe")
    dropped = products({"mode": "selective", "save": ("collective",)}, "moe")
    for name in (attention, experts):
        assert kept[name] == plain[name] < dropped[name]


def test_generation_is_left_alone() -> None:
    decoder = build(small_config())
    tokens = random_tokens(decoder.config, 1, 8)
    with torch.no_grad():
        expected = decoder(tokens)
        for settings in MODES:
            applied(decoder, settings)
        assert torch.equal(decoder(tokens), expected)


def test_offload_moves_activations_once_and_weights_never() -> None:
    config = small_config(num_layers=2)
    decoder = build(config)
    offload = applied(decoder, {"mode": "offload"})
    assert offload is not None
    tokens = random_tokens(config, 2, 17)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        plain = build(config)
        x = torch.randn(2, 16, config.d_model, requires_grad=True)
        prepared = plain.attention_core.prepare(None, 16, 16, x.device)
        rotary = rotary_table(torch.arange(16), config.head_dim, config.rope_theta)
        plain.layers["0"](x, rotary, prepared)
    weights = {p.untyped_storage().data_ptr() for p in plain.parameters()}
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in saved) if s.data_ptr() not in weights}
    decoder(tokens[:, :-1], tokens[:, 1:])
    assert offload.moved_bytes == 2 * sum(storages.values())
    offload.smallest_bytes = 2**30
    decoder(tokens[:, :-1], tokens[:, 1:])
    assert offload.moved_bytes == 2 * sum(storages.values())


def test_offload_survives_a_second_backward_and_interleaved_micro_batches() -> None:
    config = small_config(num_layers=3)
    batches = [random_tokens(config, 2, 17, seed) for seed in range(3)]
    outcomes = []
    for settings in ({"mode": "none"}, {"mode": "offload"}):
        decoder = build(config)
        applied(decoder, settings)
        losses = [decoder(tokens[:, :-1], tokens[:, 1:]).token_loss_sum for tokens in batches]
        losses[1].backward(retain_graph=True)
        for loss in losses:
            loss.backward()
        outcomes.append([p.grad for p in decoder.parameters()])
    for plain, moved in zip(*outcomes, strict=True):
        assert torch.equal(plain, moved)


def on_an_axis(world: Any, settings: dict[str, Any]) -> tuple[list[Tensor], dict[str, int]]:
    """Blocks whose attention gathers a sequence and scatters its result, as tensor parallelism has them do."""
    axis = Axis(name="tp", size=2, rank=world.rank, ranks=(0, 1), group=dist.group.WORLD)
    decoder = build(small_config(num_layers=2))
    for block in decoder.layers.values():
        block.mlp.register_forward_pre_hook(lambda _, args: (all_gather(args[0], axis, 1),))
        block.mlp.register_forward_hook(lambda _, args, y: reduce_scatter(y, axis, 1) / 2)
    applied(decoder, settings)
    with Count() as count:
        found = gradients(decoder)
    return list(found.values()), {name: n for name, n in count.calls.items() if "_c10d_functional" in name}


def test_collectives_are_repeated_by_full_only(gloo_ranks: Any) -> None:
    plain = gloo_ranks(2, on_an_axis, {"mode": "none"})
    gather = "_c10d_functional::all_gather_into_tensor"
    for settings in ({"mode": "selective"}, {"mode": "full"}):
        for (grads, calls), (expected, before) in zip(gloo_ranks(2, on_an_axis, settings), plain, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
            assert calls[gather] == before[gather] + (2 if settings["mode"] == "full" else 0)


@pytest.mark.compiler
@pytest.mark.slow
@requires("compiler")
@pytest.mark.parametrize("settings", [MODES[0], MODES[2], MODES[4]], ids=str)
def test_compiled_blocks(settings: dict[str, Any]) -> None:
    config = small_config(num_layers=2, **SHAPES["moe"])
    expected = gradients(build(config))
    decoder = build(config)
    applied(decoder, settings, compile_blocks=compile_blocks)
    actual = gradients(decoder)
    for name, grad in expected.items():
        assert (actual[name] - grad).norm() <= 1e-6 * grad.norm() + 1e-9, name


class InPieces(ScaledDotProduct):
    """A core that the compiler does not take, as those of context parallelism."""

    @torch.compiler.disable
    def __call__(self, *args: Any) -> Tensor:
        return super().__call__(*args)


@pytest.mark.compiler
@pytest.mark.slow
@requires("compiler")
@pytest.mark.parametrize(("settings", "is_compiled"), [(MODES[0], False), (MODES[2], True)], ids=str)
def test_blocks_that_compile_in_pieces(settings: dict[str, Any], is_compiled: bool) -> None:
    config = small_config(num_layers=2)
    expected = gradients(build(config))
    decoder = build(config, seams=Seams(attention_core=InPieces()))
    applied(decoder, settings, compile_blocks=compile_blocks)
    torch._dynamo.reset()
    counters.clear()
    actual = gradients(decoder)
    assert bool(counters["stats"]["unique_graphs"]) == is_compiled
    for name, grad in expected.items():
        assert (actual[name] - grad).norm() <= 1e-6 * grad.norm() + 1e-9, name
