"""What a mode keeps and saves is told as measured, beside the formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megamodel.model.config import ModelConfig
from megamodel.train.activation_bytes import ActivationSetting, kept_by_block
from megamodel.train.activation_memory import apply_activation_memory
from megamodel.train.activation_watch import ActivationWatch, BlockMeasurements, allocated_bytes, measured_blocks
from megamodel.train.batch import TokenBatch
from megamodel.train.build import build_model
from megamodel.train.callbacks.base import Callback
from megamodel.train.config import ActivationMemoryConfig, OptimizerConfig
from megamodel.train.optimizer import build_optimizers
from megamodel.train.step import TrainStep
from parallel.layout import Layout
from parallel.world import open_world
from tests.megamodel.small import build, random_tokens, small_config
from tests.megamodel.train.jobs import small_job
from tests.parallel.models import flat_mesh

CPU = torch.device("cpu")


def has_allocator() -> bool:
    """Whether the C library counts what torch allocates."""
    before = allocated_bytes(CPU)
    block = torch.zeros(2**20)
    after = allocated_bytes(CPU)
    return before is not None and after is not None and after - before >= block.untyped_storage().nbytes()


def large_config() -> ModelConfig:
    """Large enough that Python's own objects do not count, dense and MoE."""
    moe = {"num_experts": 4, "top_k": 2, "d_ff": 128, "first_layer": 2}
    return small_config(num_layers=4, d_model=128, num_heads=4, head_dim=32, d_ff=256, max_seq_len=256, moe=moe)


def measure(settings: dict[str, Any]) -> tuple[int | None, int | None]:
    config = large_config()
    decoder = build(config)
    memory = ActivationMemoryConfig(**settings)
    apply_activation_memory(decoder, memory)
    tokens = random_tokens(config, 4, 257)
    decoder(
        tokens[:, :-1], tokens[:, 1:]
    ).token_loss_sum.backward()  # kernels keep room of their own from the first call on
    with measured_blocks([decoder], memory, CPU) as measured:
        terms = decoder(tokens[:, :-1], tokens[:, 1:])
        terms.token_loss_sum.backward()
    return measured.total([decoder], memory)


@pytest.mark.skipif(not has_allocator(), reason="the C library does not count what torch allocates")
@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "none"},
        {"mode": "selective"},
        {"mode": "full"},
        {"mode": "full", "every_n_layers": 2},
        {"mode": "offload"},
    ],
    ids=str,
)
def test_measured_is_what_the_formula_says(settings: dict[str, Any]) -> None:
    setting = ActivationSetting(
        model=large_config(), layout=Layout(), micro_batch_size=4, seq_len=256, activation_bytes=4, casts_weights=False
    )
    kept, whole = measure(settings)
    assert kept is not None
    assert whole is not None
    for memory, found in ((ActivationMemoryConfig(**settings), kept), (ActivationMemoryConfig(), whole)):
        expected = sum(sum(kept_by_block(setting, layer, memory).values()) for layer in range(4))
        assert found == pytest.approx(expected, rel=0.05, abs=600_000)


def test_blocks_are_as_before_afterwards() -> None:
    decoder = build(small_config())
    with measured_blocks([decoder], ActivationMemoryConfig(), CPU):
        assert "forward" in decoder.layers["0"].__dict__
    assert "forward" not in decoder.layers["0"].__dict__


def test_without_a_counting_allocator_nothing_is_made_up() -> None:
    decoder = build(small_config())
    assert BlockMeasurements().total([decoder], ActivationMemoryConfig()) == (None, None)


class Ear(Callback):
    """Remembers events."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, dict[str, Any]]] = []

    def on_event(self, event: str, **details: object) -> None:
        self.heard.append((event, dict(details)))


def test_the_second_step_tells_and_computes_what_it_would(tmp_path: Path) -> None:
    outcomes = []
    for watched in (False, True):
        job = small_job(tmp_path, activation_memory={"mode": "full"})
        with open_world(device="cpu") as world:
            mesh = flat_mesh(world)
            built = build_model(job.model, job.train, job.parallel, mesh=mesh, seed=0, seq_len=32)
            optimizers = build_optimizers(built.data_parallel.parameters(), OptimizerConfig(), torch.float32, mesh)
            step: Any = TrainStep(built, optimizers, max_norm=1.0)
            ear = Ear()
            if watched:
                step = ActivationWatch(job, step, [ear], first_step=5)
            tokens = random_tokens(job.model, 8, 33)
            batch = TokenBatch(tokens_BS=tokens[:, :-1], labels_BS=tokens[:, 1:], document_ids_BS=None)
            results = [step([batch], lr_factor=1.0, stop_requested=lambda: False) for _ in range(3)]
        outcomes.append([(result.loss, result.grad_norm) for result in results])
    assert outcomes[0] == outcomes[1]
    ((event, details),) = ear.heard
    assert (event, details["step"], details["mode"]) == ("activation_memory", 6, "full")
    assert details["saved_bytes_predicted"] > details["kept_bytes_predicted"] > 0
    if has_allocator():
        assert details["saved_bytes_measured"] > 0.5 * details["saved_bytes_predicted"]
