"""`kill -9` of one rank of four, under every parallel style: a clear end, nobody left behind, and the same command goes on
to the losses of a run that nobody disturbed."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import psutil
import pytest

from tests.requirements import requires
from tests.system.runs import Run, ranks_of, wait_until_gone

CONFIG = Path(__file__).parents[2] / "configs" / "parity.toml"
RANKS = 4
LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-4
_PATIENCE_SECONDS = 120.0

STYLES: dict[str, tuple[int, tuple[str, ...]]] = {
    "ddp": (0, ()),
    "fsdp2": (3, ("data_engine=fsdp2",)),
    "tp": (1, ("tp=4",)),
    "cp-ring": (2, ("cp=4", "context_method=ring")),
    "ep": (1, ("ep=4",)),
    "pp-1f1b": (3, ("pp=4",)),
    "pp-zbv": (0, ("pp=2", "pipeline_schedule=zbv")),
    "pp2-tp2-ep2-fsdp2": (2, ("pp=2", "tp=2", "ep=2", "data_engine=fsdp2")),
    "deepspeed": (2, ("data_engine=deepspeed",)),
}
"""The rank that is killed, and settings of `[parallel]`."""


def _run(root: Path, name: str, ranks: int, *parallel: str) -> Run:
    common = [f"data.cache_directory={root}/cache", "train.checkpoint.every_steps=4", "train.log.tensorboard=false"]
    if any(setting.startswith("pp=") for setting in parallel):
        common.append("train.micro_batch_size=4")  # pipelines would take one sample at a time
    settings = (*common, *(f"parallel.{setting}" for setting in parallel))
    return Run(root=root, name=name, config=CONFIG, ranks=ranks, settings=settings)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """On one rank, which every layout equals."""
    run = _run(tmp_path_factory.mktemp("kill-layouts"), "whole", 1)
    run.finish()
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "style", [pytest.param(style, marks=requires("deepspeed") if style == "deepspeed" else ()) for style in STYLES]
)
def test_kill_9_of_a_rank_under_every_style(undisturbed: Run, style: str) -> None:
    victim, parallel = STYLES[style]
    run = _run(undisturbed.root, style, RANKS, *parallel)
    with run.started() as process:
        run.wait_until(process, lambda: bool(run.figures()))
        ranks = ranks_of(process)  # now, since to look for them takes steps
        assert sorted(ranks) == list(range(RANKS))
        run.wait_until(process, lambda: bool(run.steps_of("checkpoint")))
        ranks[victim].send_signal(signal.SIGKILL)
        assert process.wait(timeout=_PATIENCE_SECONDS) == 1, run.said
        _, alive = psutil.wait_procs(list(ranks.values()), timeout=_PATIENCE_SECONDS)
        assert not alive
        assert not wait_until_gone(process.pid)
    _assert_one_clear_cause(run.said, victim)
    assert len(run.figures()) < len(undisturbed.figures())
    run.finish()
    assert run.steps_of("resume")[0] >= run.steps_of("checkpoint")[0] > 0
    _assert_equal(run, undisturbed)


def _assert_one_clear_cause(said: str, victim: int) -> None:
    causes = re.findall(r"error: .*", said, re.IGNORECASE)
    assert len(causes) == 1, said
    assert re.fullmatch(
        rf"error: rank {victim} of {RANKS} was killed by SIGKILL.*the same command continues.*", causes[0]
    )
    assert "Traceback" not in said


def _assert_equal(run: Run, expected: Run) -> None:
    found, there = run.figures(), expected.figures()
    assert [step for step, _, _ in found] == [step for step, _, _ in there]
    for (step, loss, norm), (_, expected_loss, expected_norm) in zip(found, there, strict=True):
        assert loss == pytest.approx(expected_loss, rel=LOSS_TOLERANCE), step
        assert norm == pytest.approx(expected_norm, rel=NORM_TOLERANCE), step
