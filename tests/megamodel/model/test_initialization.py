"""Initial weights depend on the seed and a tensor's name only."""

from __future__ import annotations

import math

import torch

from megamodel.model.decoder import Decoder
from megamodel.model.initialization import initial_value, initialize
from tests.megamodel.small import MLA, MOE, build, small_config

CONFIG = small_config(d_model=64, moe={**MOE, "first_layer": 1, "balance": "bias"}, qk_norm=True, init_std=0.02)


def test_same_on_meta_and_on_the_cpu_and_whatever_the_global_generator_did() -> None:
    torch.manual_seed(123)
    torch.randn(7)
    direct = Decoder(CONFIG)
    initialize(direct, CONFIG, seed=5)
    materialised = build(CONFIG, seed=5)
    for name, tensor in materialised.state_dict().items():
        assert torch.equal(direct.state_dict()[name], tensor), name


def test_order_does_not_matter() -> None:
    shapes = {name: tensor.shape for name, tensor in build(CONFIG).state_dict().items()}
    forwards = {name: initial_value(name, shape, CONFIG, 1) for name, shape in shapes.items()}
    for name in reversed(shapes):
        assert torch.equal(initial_value(name, shapes[name], CONFIG, 1), forwards[name])


def test_every_tensor_is_filled_and_differs_from_the_others() -> None:
    with torch.device("meta"):
        decoder = Decoder(CONFIG)
    decoder.to_empty(device="cpu")
    for tensor in decoder.state_dict().values():
        tensor.fill_(math.nan)
    initialize(decoder, CONFIG, seed=0)
    seen = set()
    for name, tensor in decoder.state_dict().items():
        assert bool(tensor.isfinite().all()), name
        if tensor.dim() > 1:
            first = float(tensor.flatten()[0])
            assert first not in seen
            seen.add(first)


def test_seeds_differ() -> None:
    first, second = build(CONFIG, seed=0), build(CONFIG, seed=1)
    assert not torch.equal(first.embedding.weight, second.embedding.weight)


def test_scales() -> None:
    config = small_config(d_model=64, d_ff=512, num_layers=8, moe={**MOE, "first_layer": 1}, mla=MLA, init_std=0.02)
    for name, tensor in build(config).state_dict().items():
        if name.endswith("norm.weight"):
            assert bool((tensor == 1).all()), name
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight", "w_down_EFD"))
        expected = 0.02 / math.sqrt(16) if residual else 0.02
        assert abs(float(tensor.std()) / expected - 1) < 0.2, name
        assert abs(float(tensor.mean())) < 0.2 * expected, name


def test_balance_bias_starts_at_zero() -> None:
    state = build(CONFIG).state_dict()
    assert not state["layers.1.moe.router.balance_bias"].any()
