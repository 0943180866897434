"""A run that was interrupted, however, continues as if it had not been."""

from __future__ import annotations

import json
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from megamodel.errors import RefusedError
from megamodel.train.config import TrainConfig
from megamodel.train.job import TrainingJob, TrainingResult
from megamodel.train.restore import restore_decoder
from megamodel.train.run_directory import RunDirectory, seconds_of
from megamodel.train.step import StepResult, TrainStep
from parallel.world import World
from tests.gloo_pool import GlooPool, RankFailureError
from tests.megamodel.train.jobs import losses, prepared, small_job, step_lines, train_job, train_poisoned
from tests.requirements import requires


class _SignalAtStep:
    """Sends this process a signal in the middle of its n-th call of the training step."""

    def __init__(self, step: TrainStep, number: int, signal_number: int) -> None:
        self._step, self._left, self._signal = step, number, signal_number

    def __call__(self, *args: object, **kwargs: object) -> StepResult:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), self._signal)
        return self._step(*args, **kwargs)  # type: ignore[arg-type]


def _train_with_signal(world: World, job: TrainingJob, rank: int, at_call: int, signal_number: int) -> TrainingResult:
    """As `train_job`, but one rank gets a signal while it steps."""
    if world.rank != rank:
        return train_job(world, job)
    from megamodel.train import run

    original = run.TrainStep
    run.TrainStep = lambda *args, **parts: _SignalAtStep(original(*args, **parts), at_call, signal_number)  # type: ignore[assignment,misc]
    try:
        return train_job(world, job)
    finally:
        run.TrainStep = original  # type: ignore[misc]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("at_call", [4, 7])
def test_after_kill_9_of_a_rank_the_losses_are_bit_equal(
    gloo_ranks: GlooPool, tmp_path: Path, engine: str, at_call: int
) -> None:
    whole = small_job(tmp_path, name="whole", engine=engine)
    prepared(whole)
    gloo_ranks(2, train_job, whole)
    killed = small_job(tmp_path, name="killed", engine=engine)
    with pytest.raises(RankFailureError) as failure:
        gloo_ranks(2, _train_with_signal, killed, 1, at_call, signal.SIGKILL)
    assert 1 in failure.value.died
    gloo_ranks(2, train_job, killed)
    assert losses(killed) == losses(whole)
    assert [step for step, _, _ in losses(killed)] == list(range(1, 13))


def test_three_ranks_resume_bit_equal_too(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    """From three ranks on, the order of summation counts: DDP must not regroup its buckets after its first step."""
    whole = small_job(tmp_path, name="whole", global_batch_size=9)
    prepared(whole)
    gloo_ranks(3, train_job, whole)
    stopped = small_job(tmp_path, name="stopped", global_batch_size=9)
    results = gloo_ranks(3, _train_with_signal, stopped, 2, 6, signal.SIGUSR1)
    assert [result.steps for result in results] == [6, 6, 6]
    gloo_ranks(3, train_job, stopped)
    assert losses(stopped) == losses(whole)


def test_a_sharded_run_in_bf16_resumes_bit_equal(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    """Norms and routers are whole on every rank there, beside sharded matrices."""
    whole = small_job(tmp_path, name="whole", engine="fsdp2", precision="bf16", steps=6)
    prepared(whole)
    gloo_ranks(2, train_job, whole)
    stopped = small_job(tmp_path, name="stopped", engine="fsdp2", precision="bf16", steps=6)
    gloo_ranks(2, _train_with_signal, stopped, 1, 3, signal.SIGUSR1)
    gloo_ranks(2, train_job, stopped)
    assert losses(stopped) == losses(whole)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_any_rank_stops_all_after_saving(gloo_ranks: GlooPool, tmp_path: Path, signal_number: int) -> None:
    job = small_job(tmp_path, steps=6, checkpoint={"every_steps": 0})
    prepared(job)
    results = gloo_ranks(2, _train_with_signal, job, 1, 3, signal_number)
    assert [(result.steps, result.finished) for result in results] == [(3, False), (3, False)]
    assert restore_decoder(RunDirectory(job.run_directory)).step == 3
    finished = gloo_ranks(2, train_job, job)
    assert [(result.steps, result.finished) for result in finished] == [(6, True), (6, True)]


def test_a_signal_in_the_last_step_still_ends_the_run_with_its_validation(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    job = small_job(tmp_path, steps=4, validation={"every_steps": 0})
    result = gloo_ranks(1, _train_with_signal, job, 0, 4, signal.SIGTERM)[0]
    assert (result.steps, result.finished) == (4, True)
    assert result.val_loss is not None
    assert gloo_ranks(1, train_job, job)[0].val_loss == result.val_loss


@pytest.mark.parametrize(("engine", "ranks"), [("fsdp2", 1), ("ddp", 4)])
def test_another_number_of_ranks_sees_the_same_batches(
    gloo_ranks: GlooPool, tmp_path: Path, engine: str, ranks: int
) -> None:
    whole = small_job(tmp_path, name="whole", engine=engine)
    prepared(whole)
    gloo_ranks(2, train_job, whole)
    changed = small_job(tmp_path, name="changed", engine=engine)
    gloo_ranks(2, _train_with_signal, changed, 0, 6, signal.SIGTERM)
    gloo_ranks(ranks, train_job, changed)
    for (step, loss, norm), (other_step, other_loss, other_norm) in zip(losses(whole), losses(changed), strict=True):
        assert step == other_step
        assert other_loss == pytest.approx(loss, rel=1e-5), step
        assert other_norm == pytest.approx(norm, rel=1e-3), step


def test_a_finished_run_says_so_and_keeps_its_figures(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    job = small_job(tmp_path, steps=4)
    first = gloo_ranks(1, train_job, job)[0]
    before = RunDirectory(job.run_directory).metrics.read_bytes()
    again = gloo_ranks(1, train_job, job)[0]
    assert again.finished
    assert (again.final_loss, again.val_loss, again.steps) == (first.final_loss, first.val_loss, 4)
    assert again.tokens_per_s is None
    assert RunDirectory(job.run_directory).metrics.read_bytes() == before


def test_a_corrupt_newest_checkpoint_is_reported_and_the_one_before_is_taken(
    gloo_ranks: GlooPool, tmp_path: Path
) -> None:
    whole = small_job(tmp_path, name="whole")
    gloo_ranks(1, train_job, whole)
    job = small_job(tmp_path, name="damaged")
    gloo_ranks(1, _train_with_signal, job, 0, 6, signal.SIGTERM)
    run = RunDirectory(job.run_directory)
    newest = run.checkpoints / "step-00000006"
    shard = next(newest.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    lost = [line for line in run.read_metrics() if line["step"] > 4]
    gloo_ranks(1, train_job, job)
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "corrupt_checkpoint"] == [6]
    assert [event["step"] for event in events if event["event"] == "resume"] == [4]
    (rollback,) = [event for event in events if event["event"] == "rollback"]
    assert (rollback["from_step"], rollback["to_step"], rollback["lost_steps"]) == (6, 4, 2)
    assert rollback["lost_seconds"] == pytest.approx(sum(map(seconds_of, lost)))
    assert (rollback["since"], rollback["until"]) == (lost[0]["time"] - seconds_of(lost[0]), lost[-1]["time"])
    assert rollback["message"].startswith("2 step(s) after step 4 had been made and not saved; they are made again (")
    names = [event["event"] for event in events]
    assert names.index("rollback") < names.index("resume")
    assert losses(job) == losses(whole)


def test_another_model_or_seed_under_the_same_name_is_refused(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    job = small_job(tmp_path, steps=2)
    gloo_ranks(1, train_job, job)
    other = small_job(tmp_path, steps=4, model={"d_ff": 56})
    with pytest.raises(RankFailureError, match=r"model\.d_ff was 48 and is 56.*run\.name"):
        gloo_ranks(1, train_job, replace(other, train=other.train))
    with pytest.raises(RankFailureError, match=r"run\.seed was 7 and is 8"):
        gloo_ranks(1, train_job, replace(job, seed=8))


def test_more_steps_continue_a_finished_run(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    job = small_job(tmp_path, steps=3)
    gloo_ranks(1, train_job, job)
    longer = replace(job, train=TrainConfig(**{**job.train.model_dump(), "steps": 5}))
    assert gloo_ranks(1, train_job, longer)[0].steps == 5
    assert [step for step, _, _ in losses(longer)] == [1, 2, 3, 4, 5]


def test_a_batch_that_does_not_divide_is_refused(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    job = small_job(tmp_path, global_batch_size=6, micro_batch_size=2)
    prepared(job)
    with pytest.raises(RankFailureError, match=r"global_batch_size = 6: cannot be shared by 2 data ranks of 2 samples"):
        gloo_ranks(2, train_job, job)
    assert RefusedError.exit_code == 2, "the next attempt of a job would say the same"


def _train_differently(world: World, jobs: list[TrainingJob]) -> TrainingResult:
    return train_job(world, jobs[world.rank])


def test_ranks_that_would_train_on_different_things_are_refused(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    job, longer = small_job(tmp_path), small_job(tmp_path, steps=13)
    prepared(job)
    with pytest.raises(RankFailureError, match=r"do not train the same: train\.steps is 13 on rank 1 and 12 on rank 0"):
        gloo_ranks(2, _train_differently, [job, longer])
    elsewhere = small_job(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "corpus" / "00.txt").write_text("Something else altogether, on one host alone. " * 9)
    prepared(elsewhere)
    with pytest.raises(RankFailureError, match=r"hash of the prepared tokens.*on rank 1"):
        gloo_ranks(2, _train_differently, [job, replace(elsewhere, run_directory=job.run_directory)])


def test_a_run_of_bad_gradients_is_counted_across_restarts(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    job = small_job(tmp_path, max_skipped_steps=3, checkpoint={"every_steps": 2})
    for last_step in (2, 3):
        with pytest.raises(RankFailureError) if last_step == 3 else nullcontext():
            gloo_ranks(1, train_poisoned, replace(job, train=job.train.model_copy(update={"steps": last_step})))
    assert [line["skipped_steps"] for line in step_lines(job)] == [1, 2, 3]


@pytest.mark.compiler
@pytest.mark.slow
@requires("compiler")
def test_compiled_runs_with_accumulation_resume_bit_equal(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    """What `make train` does, in fp32: compiled blocks, compiled loss, explicit attention."""
    settings = {"compile": "on", "micro_batch_size": 2, "steps": 8, "validation": {"every_steps": 3}}
    whole, stopped = (small_job(tmp_path, name=name, **settings) for name in ("whole", "stopped"))
    prepared(whole)
    gloo_ranks(2, train_job, whole, timeout_s=200)
    gloo_ranks(2, _train_with_signal, stopped, 1, 5, signal.SIGTERM, timeout_s=200)
    gloo_ranks(2, train_job, stopped, timeout_s=200)
    assert losses(stopped) == losses(whole)
