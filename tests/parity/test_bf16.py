"""A hundred steps in bf16 end where one rank's hundred steps in bf16 end, to half a percent, under every style.

Rounding differs between layouts (sums are cut elsewhere), so runs drift apart; that the gradients are right, float32 shows in
test_parity. The text is made of twenty words, so that there is much to learn: losses fall to a third of where they start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from parallel.config import ParallelConfig
from tests.gloo_pool import GlooPool
from tests.megamodel.train.jobs import losses, prepared, small_job, train_job

STEPS = 100
TOLERANCE = 0.005
TOLERANCE_OF_BF16_PARAMETERS = 0.03
"""To float32 ones. Updates below 1/256 of a weight are lost."""

FSDP = {"data_engine": "fsdp2"}
STYLES: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {}),
    "fsdp2": (2, FSDP),
    "tp": (2, {"tp": 2}),
    "cp": (2, {"cp": 2}),
    "ep": (2, {"ep": 2}),
    "pp": (2, {"pp": 2}),
    "tp2-fsdp2": (4, {"tp": 2, **FSDP}),
}
MODEL = {"moe": {"num_experts": 4, "top_k": 2, "d_ff": 32, "num_shared_experts": 1, "first_layer": 1}}


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Nats a token: the first step, the mean of the last five steps, and all held-out text after the last one."""

    first: float
    last: float
    held_out: float


class Runs:
    """Trains each run once."""

    def __init__(self, gloo_ranks: GlooPool, root: Path) -> None:
        self._gloo_ranks, self._root = gloo_ranks, root
        self._known: dict[str, Ending] = {}

    def ending(self, ranks: int, parallel: dict[str, Any], precision: str = "bf16") -> Ending:
        name = f"{ranks}-{precision}-" + "-".join(f"{key}_{value}" for key, value in parallel.items())
        if name not in self._known:
            self._known[name] = self._train(name, ranks, parallel, precision)
        return self._known[name]

    def _train(self, name: str, ranks: int, parallel: dict[str, Any], precision: str) -> Ending:
        job = small_job(
            self._root,
            name=name,
            model=MODEL,
            steps=STEPS,
            precision=precision,
            optimizer={"lr": 3e-3},
            schedule={"warmup_steps": 10},
            checkpoint={"every_steps": 0},
            validation={"every_steps": 0},
            log={"tensorboard": False},
        )
        job = replace(job, parallel=ParallelConfig(**parallel, timeout_seconds=120))
        prepared(job)
        result = self._gloo_ranks(ranks, train_job, job, timeout_s=500.0)[0]
        curve = [loss for _, loss, _ in losses(job)]
        assert len(curve) == STEPS
        assert result.val_loss is not None
        return Ending(first=curve[0], last=sum(curve[-5:]) / 5, held_out=result.val_loss)


@pytest.fixture(scope="module")
def runs(gloo_ranks: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(gloo_ranks, tmp_path_factory.mktemp("bf16"))


def _assert_near(found: Ending, expected: Ending, tolerance: float) -> None:
    assert found.last == pytest.approx(expected.last, rel=tolerance)
    assert found.held_out == pytest.approx(expected.held_out, rel=tolerance)


@pytest.mark.parametrize("style", STYLES)
def test_bf16_ends_where_one_rank_does(runs: Runs, style: str) -> None:
    _assert_near(runs.ending(*STYLES[style]), runs.ending(1, {}), TOLERANCE)


def test_bf16_is_near_fp32_and_there_is_much_to_learn(runs: Runs) -> None:
    in_bf16, in_fp32 = runs.ending(1, {}), runs.ending(1, {}, "fp32")
    assert in_fp32.last < 0.35 * in_fp32.first
    _assert_near(in_bf16, in_fp32, TOLERANCE)


@pytest.mark.parametrize("style", ["ddp", "fsdp2", "tp"])
def test_parameters_in_bf16_with_sums_in_fp32(runs: Runs, style: str) -> None:
    ranks, parallel = STYLES[style]
    settings = {"param_dtype": "bf16", "reduce_dtype": "fp32"}
    found = runs.ending(ranks, {**parallel, **settings})
    _assert_near(found, runs.ending(1, settings), TOLERANCE)
    _assert_near(found, runs.ending(1, {}), TOLERANCE_OF_BF16_PARAMETERS)
