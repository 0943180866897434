"""What a model asks of its layout, and where its pipeline is cut."""

from __future__ import annotations

import pytest

from megamodel.model.config import ModelConfig
from megamodel.model.presets import PRESETS
from megamodel.model.size import training_flops_per_token
from megamodel.train.config import TrainConfig
from megamodel.train.layout import layer_costs, layers_of_stages, layout_demands, run_plan
from parallel.config import ParallelConfig
from parallel.layout import Layout


@pytest.mark.parametrize("preset", ["moe-tiny", "dense-7m", "llama3-70b", "mixtral-8x7b", "deepseek-v3"])
def test_costs_add_up_to_the_models_training_flops(preset: str) -> None:
    model = ModelConfig(preset=preset)
    costs = layer_costs(model, seq_len=4096)
    assert sum(costs.layers) + costs.head == pytest.approx(training_flops_per_token(model, 4096), rel=1e-9)
    assert 0 < costs.embedding < min(costs.layers)


def test_demands_name_only_what_a_model_has() -> None:
    def demands(preset: str):  # type: ignore[no-untyped-def]
        return layout_demands(ModelConfig(preset=preset), TrainConfig(), seq_len=64)

    dense, moe, mla = demands("llama3-8b"), demands("mixtral-8x7b"), demands("deepseek-v3")
    assert (dense.num_experts, dense.expert_d_ff, dense.shared_d_ff, dense.d_ff) == (None, None, None, 14336)
    assert (moe.num_experts, moe.d_ff, moe.shared_d_ff) == (8, None, None)  # every layer is MoE
    assert (mla.num_kv_heads, mla.shared_d_ff, mla.d_ff) == (None, 2048, 18432)
    assert set(PRESETS) >= {"llama3-8b", "mixtral-8x7b", "deepseek-v3"}


def test_a_pipeline_is_cut_by_cost_or_as_configured() -> None:
    model = ModelConfig(preset="llama3-8b")
    assert layers_of_stages(model, ParallelConfig(), seq_len=8192) == (32,)
    # The head is worth about two layers, the embedding nearly nothing.
    assert layers_of_stages(model, ParallelConfig(pp=4), seq_len=4096) == (8, 9, 9, 6)
    assert len(layers_of_stages(model, ParallelConfig(pp=4, pipeline_schedule="zbv"), seq_len=4096)) == 8
    uneven = ParallelConfig(pp=2, pipeline_split=[20, 12])
    assert layers_of_stages(model, uneven, seq_len=4096) == (20, 12)


def test_the_plan_of_a_run() -> None:
    model, train = ModelConfig(preset="moe-7m"), TrainConfig(global_batch_size=16)
    plan = run_plan(model, train, ParallelConfig(pp=2, tp=2, ep=2), seq_len=64, world_size=8)
    assert plan.layout == Layout(pp=2, dp_shard=2, tp=2, ep=2)
    assert (plan.micro_batch_size, plan.num_micro_batches) == (1, 8)
    assert sum(plan.layers_of_stages) == model.num_layers
    assert plan.expected_bubble == pytest.approx(1 / 9)
