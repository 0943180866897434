"""Parameter counts of the published shapes, and operations per token."""

from __future__ import annotations

import pytest

from megamodel.model.config import ModelConfig
from megamodel.model.size import model_size, training_flops_per_token
from tests.megamodel.small import MLA, MOE, build, small_config


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("llama3-8b", 8.03e9),
        ("llama3-70b", 70.6e9),
        ("llama3-405b", 405.85e9),
        ("mixtral-8x7b", 46.7e9),
        ("qwen3-30b-a3b", 30.5e9),
        ("deepseek-v3", 671e9),
    ],
)
def test_total_parameters_are_the_published_ones(preset: str, published: float) -> None:
    assert model_size(ModelConfig(preset=preset)).total == pytest.approx(published, rel=0.01)


# Authors give two digits, and differ in whether they count the embeddings.
@pytest.mark.parametrize(
    ("preset", "published"), [("mixtral-8x7b", 12.9e9), ("qwen3-30b-a3b", 3.3e9), ("deepseek-v3", 37e9)]
)
def test_active_parameters_are_the_published_ones(preset: str, published: float) -> None:
    assert model_size(ModelConfig(preset=preset)).active == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(
    "fields", [{}, {"tie_embeddings": True}, {"moe": {**MOE, "num_shared_experts": 1}}, {"mla": MLA}]
)
def test_total_is_that_of_the_real_decoder(fields: dict) -> None:
    config = small_config(**fields)
    assert model_size(config).total == sum(parameter.numel() for parameter in build(config).parameters())


def test_active_counts_the_chosen_experts() -> None:
    size = model_size(small_config(moe=MOE))
    idle = 2 * 2 * 3 * 32 * 24  # 2 layers, 2 experts not chosen, 3 matrices
    assert size.total - size.active == idle


def test_flops_by_hand() -> None:
    config = small_config()
    attention_weights = 32 * 32 + 2 * 32 * 16 + 32 * 32
    matrices = 2 * (attention_weights + 3 * 32 * 48) + 97 * 32  # the embedding is only looked up
    scores_and_values = 6 * 2 * 4 * (8 + 8) * 50
    assert training_flops_per_token(config, 50) == 6 * matrices + scores_and_values
    tied = small_config(tie_embeddings=True)
    assert training_flops_per_token(tied, 50) == training_flops_per_token(config, 50)


def test_flops_of_latent_attention_take_its_own_widths() -> None:
    config = small_config(mla=MLA)
    per_token = training_flops_per_token(config, 11) - training_flops_per_token(config, 10)
    assert per_token == 6 * 2 * 4 * (6 + 4 + 8)
