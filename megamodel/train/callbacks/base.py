"""What the training loop tells those who watch it."""

from __future__ import annotations

from dataclasses import dataclass

from megamodel.train.step import StepResult
from megamodel.train.validation import ValidationResult


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What does not change during a run."""

    total_steps: int
    first_step: int
    """First step of this start of the run: 1, or one after the checkpoint that it continues from."""
    num_parameters: int
    num_active_parameters: int
    flops_per_token: float
    """Forward and backward, by the formula in `megamodel.model.size`."""
    peak_flops: float | None
    """Published bf16 FLOP/s of all devices of the run together; None where unknown, or where the run is not in bf16."""
    peak_source: str | None
    """The peak in words: device, count, where the figure is from."""
    world_size: int
    device_name: str


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step, with its times in seconds of wall clock."""

    step: int
    tokens: int
    """Tokens since the beginning of the run, this step's included."""
    epoch: float
    """Passes over the training data so far."""
    result: StepResult
    lr: float
    """AdamW's learning rate in this step."""
    step_time_s: float
    """Waiting for the batch, forward, backward and update; without validation, saving and the writing of records."""
    data_s: float
    """Waiting for the batch."""
    save_s: float
    """Time that a checkpoint held up the loop before this step."""
    tokens_per_s: float
    model_flops_per_s: float
    """Of all ranks, by the formula."""
    mfu: float | None
    """model_flops_per_s / peak, where the peak is known."""
    memory_bytes: int
    """Largest resident memory of this process so far; on CUDA the largest device memory allocated."""
    skipped_steps: int
    """Steps skipped since the beginning of the run."""


class Callback:
    """Watches a run on rank 0. The base ignores everything."""

    def on_start(self, facts: RunFacts) -> None:
        """Before the first step of this start."""

    def on_step(self, record: StepRecord) -> None:
        """After each step."""

    def on_validation(self, step: int, result: ValidationResult, seconds: float) -> None:
        """After each validation, whose figures belong to the weights after `step`."""

    def on_event(self, event: str, **details: object) -> None:
        """Something that does not happen each step: notice, resume, checkpoint, corrupt, skip, stop, end."""

    def close(self) -> None:
        """The run is over, whatever the reason."""
