"""What a run leaves: metrics, events, TensorBoard; and what a person sees."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.dataset import PackedDataset
from megamodel.errors import RefusedError
from megamodel.model.decoder import LossTerms
from megamodel.train.build import find_compiler
from megamodel.train.callbacks.base import RunFacts, StepRecord
from megamodel.train.callbacks.progress import ProgressLine
from megamodel.train.callbacks.records import load_entropy
from megamodel.train.job import TrainingJob
from megamodel.train.restore import restore_decoder
from megamodel.train.run import train_in_world
from megamodel.train.run_directory import RunDirectory
from megamodel.train.step import StepResult
from parallel.world import World
from tests.gloo_pool import GlooPool, RankFailureError
from tests.megamodel.train.jobs import prepared, small_job, step_lines, train_job, train_poisoned


def test_a_run_leaves_its_records(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    job = small_job(tmp_path, steps=6)
    data = prepared(job)
    result = gloo_ranks(2, train_job, job)[0]
    run = RunDirectory(job.run_directory)
    lines = list(run.read_metrics())
    validation = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in validation] == [6]
    assert validation[-1]["val_loss"] == result.val_loss
    # Every held-out byte is behind exactly one label, so bits per byte is of the whole text.
    held_out = data.manifest.splits["held_out"]
    assert validation[-1]["val_bytes"] == held_out.num_bytes
    nats = validation[-1]["val_loss"] * validation[-1]["val_tokens"]
    assert validation[-1]["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / held_out.num_bytes)
    steps = step_lines(job)
    assert [line["tokens"] for line in steps] == [256 * number for number in range(1, 7)]
    assert all(sum(counts) == 256 * 2 for line in steps for counts in line["expert_counts"])
    assert steps[0]["mfu"] is None
    events = [json.loads(line)["event"] for line in run.events.read_text().splitlines()]
    assert events == ["start", "checkpoint", "checkpoint", "end"]
    assert run.tokenizer.read_bytes() == data.tokenizer_path.read_bytes()
    board = EventAccumulator(str(run.tensorboard)).Reload()
    tags = set(board.Tags()["scalars"])
    for family in ("loss", "optim", "throughput", "time", "memory", "moe", "data"):
        assert any(tag.startswith(f"{family}/") for tag in tags), family
    recorded = [event.value for event in board.Scalars("loss/train")]
    assert recorded == pytest.approx([line["loss"] for line in steps], rel=1e-6)


def test_the_restored_decoder_has_the_validation_loss_of_the_run(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    job = small_job(tmp_path, steps=4, engine="fsdp2", model={"tie_embeddings": True})
    data = prepared(job)
    result = gloo_ranks(2, train_job, job)[0]
    restored = restore_decoder(RunDirectory(job.run_directory))
    held_out = PackedDataset(data, "held_out", 32)
    rows = [held_out[index] for index in range(len(held_out))]
    nats = tokens = 0.0
    with torch.no_grad():
        for row in rows:
            terms: LossTerms = restored.decoder(
                torch.from_numpy(row.tokens_S)[None],
                torch.from_numpy(row.labels_S)[None],
                torch.from_numpy(row.document_ids_S)[None],
            )
            nats += float(terms.token_loss_sum)
            tokens += int((row.labels_S >= 0).sum())
    assert result.val_loss == pytest.approx(nats / tokens, rel=1e-5)
    assert restored.record["record"]["val_loss"] == result.val_loss


def test_a_run_of_bad_gradients_ends_with_a_clear_message(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    job = small_job(tmp_path, max_skipped_steps=3)
    with pytest.raises(RankFailureError, match=r"step 3: the gradient was NaN or infinite in 3 steps in a row"):
        gloo_ranks(1, train_poisoned, job)
    lines = step_lines(job)
    assert [(line["skipped"], line["skipped_steps"], line["loss"]) for line in lines] == [
        (True, 1, None),
        (True, 2, None),
        (True, 3, None),
    ]


def facts(**changes) -> RunFacts:
    values = {
        "total_steps": 20, "first_step": 1, "num_parameters": 7_300_000, "num_active_parameters": 5_000_000,
        "flops_per_token": 3e7, "peak_flops": None, "peak_source": None, "world_size": 2, "device_name": "a device",
    }  # fmt: skip
    return RunFacts(**{**values, **changes})


def record(**changes) -> StepRecord:
    result = StepResult(
        loss=2.5, grad_norm=1.0, skipped=False, stop_requested=False, num_valid_tokens=100, num_tokens=100,
        router=None, compute_s=0.1, update_s=0.1,
        pipeline_bubble=None,
    )  # fmt: skip
    values = {
        "step": 10, "tokens": 1000, "epoch": 0.5, "result": result, "lr": 1e-3, "step_time_s": 2.0, "data_s": 0.0,
        "save_s": 0.0, "tokens_per_s": 5000.0, "model_flops_per_s": 1.5e11, "mfu": None, "memory_bytes": 1,
        "skipped_steps": 0,
    }  # fmt: skip
    return StepRecord(**{**values, **changes})


def shown(run_facts: RunFacts, step: StepRecord) -> str:
    out = io.StringIO()
    progress = ProgressLine(Console(file=out, width=200), every_steps=10)
    progress.on_start(run_facts)
    progress.on_step(step)
    progress.close()
    return out.getvalue()


def test_the_progress_line_names_mfus_denominator_or_shows_no_mfu() -> None:
    unknown = shown(facts(), record())
    assert "step 10/20 · loss 2.5000 · 5,000 tok/s · 0.15 TFLOP/s · ETA 00:20" in unknown
    assert "no MFU" in unknown
    assert "MFU 4" not in unknown
    known = shown(facts(peak_flops=2e12, peak_source="2 TFLOP/s, the published peak of X"), record(mfu=0.45))
    assert "MFU is measured against 2 TFLOP/s, the published peak of X" in known
    assert "MFU 45.0%" in known


def test_load_entropy() -> None:
    assert load_entropy(torch.tensor([5, 5, 5, 5])) == pytest.approx(1.0)
    assert load_entropy(torch.tensor([5, 0, 0, 0])) == 0.0


def test_without_a_compiler_training_is_eager_with_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    from megamodel.train import build

    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    assert find_compiler("cpu") is None
    notice = build._missing_compiler("auto", torch.device("cpu"))
    assert notice is not None
    assert "apt-get install g++" in notice
    assert build._missing_compiler("off", torch.device("cpu")) is None
    monkeypatch.undo()
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nonexistent")
    assert find_compiler("cpu") is None
    with pytest.raises(RefusedError, match=r'set train\.compile = "off"'):
        build._missing_compiler("on", torch.device("cpu"))


def test_the_first_step_tells_its_time_and_no_speed() -> None:
    first = shown(facts(), record(step=1, step_time_s=31.0))
    assert "step 1/20 · loss 2.5000 · first step in 31.0 s" in first
    assert "ETA" not in first


def test_a_start_without_steps_is_told_apart_and_not_accepted(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    job = small_job(tmp_path, steps=1)
    assert [gloo_ranks(1, accepted, job)[0] for _ in range(2)] == [(True, True), (False, False)]


def accepted(world: World, job: TrainingJob) -> tuple[bool, bool]:
    """Whether steps were made, and whether the run was accepted as one to train."""
    calls: list[int] = []
    data = prepared(job)
    result = train_in_world(job, data, world, console=Console(file=io.StringIO()), on_accepted=lambda: calls.append(1))
    return result.trained, bool(calls)
