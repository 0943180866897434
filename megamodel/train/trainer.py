"""The training loop: batches to steps; validation, checkpoints and records when they are due."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from data_pipeline.batches import Batch, BatchLoader, ValidationBatches
from data_pipeline.dataset import PackedDataset
from megamodel.errors import TrainingError
from megamodel.train.batch import TokenBatch
from megamodel.train.build import BuiltModel
from megamodel.train.callbacks.base import Callback, RunFacts, StepRecord
from megamodel.train.checkpointing import Progress, RunCheckpoints
from megamodel.train.config import TrainConfig
from megamodel.train.schedule import learning_rate_factor
from megamodel.train.step import Step, StepResult
from megamodel.train.stop import StopRequest
from megamodel.train.validation import ValidationResult, validate
from parallel.checkpoint.store import SaveHandle
from parallel.world import World


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Both splits, and what a token weighs in bytes of text."""

    train: PackedDataset
    held_out: PackedDataset | None
    bytes_of_token_V: torch.Tensor
    document_mask: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class LoopResult:
    """How the loop ended."""

    progress: Progress
    stopped_by: str | None
    """The signal that ended it early, if one did ("another rank's signal" where that was elsewhere)."""
    final_loss: float | None
    validation: ValidationResult | None
    tokens_per_s: float | None

    @classmethod
    def already_finished(cls, progress: Progress) -> LoopResult:
        """Of a start that found nothing left to do."""
        return cls(progress=progress, stopped_by=None, final_loss=None, validation=None, tokens_per_s=None)


class Trainer:
    """One start of a run. `run` is a collective over all ranks, and so is everything that it calls."""

    def __init__(
        self,
        *,
        world: World,
        config: TrainConfig,
        built: BuiltModel,
        step: Step,
        data: TrainingData,
        checkpoints: RunCheckpoints,
        callbacks: list[Callback],
        facts: RunFacts,
        progress: Progress,
    ) -> None:
        self.world = world
        self.config = config
        self.built = built
        self.step = step
        self.data = data
        self.checkpoints = checkpoints
        self.callbacks = callbacks
        self.facts = facts
        self.progress = progress
        self._mesh = built.mesh
        self._share = config.global_batch_size // self._mesh.layout.num_data_ranks
        self._micro = built.micro_batch_size
        self._save: SaveHandle | None = None
        self._validated_step = 0
        self._speed = _Speed()

    def run(self) -> LoopResult:
        """Trains to the last step, or to the end of the step in which some rank was asked to stop."""
        last: StepResult | None = None
        validation: ValidationResult | None = None
        stopped_by: str | None = None
        for callback in self.callbacks:
            callback.on_start(self.facts)
        loader = BatchLoader(
            self.data.train,
            seed=self.data.seed,
            global_batch_size=self.config.global_batch_size,
            dp_rank=self._mesh.data_rank,
            dp_size=self._mesh.layout.num_data_ranks,
            start_position=self.progress.position,
        )
        with loader, StopRequest() as stop:
            save_s = 0.0
            while self.progress.step < self.config.steps and stopped_by is None:
                last = self._one_step(loader, stop, save_s)
                number = self.progress.step
                if (
                    last.stop_requested and number < self.config.steps
                ):  # after the last step the run is at its end anyway
                    stopped_by = stop.signal_name or "another rank's signal"
                if _due(number, self.config.validation.every_steps, self.config.steps) and stopped_by is None:
                    validation = self._validate(number)
                save_s = 0.0
                if _due(number, self.config.checkpoint.every_steps, self.config.steps) or stopped_by is not None:
                    save_s = self._save_checkpoint(last, validation)
                self._report_save()
            if self._save is not None:
                self._save.wait()
                self._report_save()
        return LoopResult(
            progress=self.progress,
            stopped_by=stopped_by,
            final_loss=last.loss if last is not None else None,
            validation=validation,
            tokens_per_s=self._speed.tokens_per_s,
        )

    def _one_step(self, loader: BatchLoader, stop: StopRequest, save_s: float) -> StepResult:
        started = time.perf_counter()
        micro_batches = list(self._micro_batches(next(loader)))
        data_s = time.perf_counter() - started
        number = self.progress.step + 1
        factor = learning_rate_factor(self.config.schedule, number, self.config.steps)
        result = self.step(micro_batches, lr_factor=factor, stop_requested=lambda: stop.requested)
        self.progress = replace(
            self.progress,
            step=number,
            position=loader.position,
            tokens=self.progress.tokens + result.num_tokens,
            skipped_steps=self.progress.skipped_steps + result.skipped,
            skipped_in_a_row=self.progress.skipped_in_a_row + 1 if result.skipped else 0,
        )
        seconds = time.perf_counter() - started
        if number > self.facts.first_step:  # the first one compiles
            self._speed.add(result.num_tokens, seconds)
        model_flops_per_s = self.facts.flops_per_token * result.num_tokens / seconds
        record = StepRecord(
            step=number,
            tokens=self.progress.tokens,
            epoch=loader.position / len(self.data.train),
            result=result,
            lr=self.config.optimizer.lr * factor,
            step_time_s=seconds,
            data_s=data_s,
            save_s=save_s,
            tokens_per_s=result.num_tokens / seconds,
            model_flops_per_s=model_flops_per_s,
            mfu=model_flops_per_s / self.facts.peak_flops if self.facts.peak_flops else None,
            memory_bytes=_peak_memory_bytes(self.world.device),
            skipped_steps=self.progress.skipped_steps,
        )
        for callback in self.callbacks:
            callback.on_step(record)
        self._watch_skipped(result, number)
        return result

    def _watch_skipped(self, result: StepResult, number: int) -> None:
        if not result.skipped:
            return
        self._tell("skip", step=number, message=f"step {number}: gradient is NaN or infinite, no update made")
        if self.progress.skipped_in_a_row >= self.config.max_skipped_steps:
            raise TrainingError(
                f"step {number}: the gradient was NaN or infinite in {self.progress.skipped_in_a_row} steps in a row; lower "
                "train.optimizer.lr, or continue from an earlier checkpoint (remove the newer ones)"
            )

    def _validate(self, number: int) -> ValidationResult | None:
        if self.data.held_out is None:
            return None
        started = time.perf_counter()
        limit = self.config.validation.max_samples or None
        batches = ValidationBatches(
            self.data.held_out,
            batch_size=self._micro,
            dp_rank=self._mesh.data_rank,
            dp_size=self._mesh.layout.num_data_ranks,
            max_samples=None if number == self.config.steps else limit,
        )
        self._validated_step = number
        result = validate(
            self.built.passes,
            (self._to_device(batch).share(self._mesh.axis("cp")) for batch in batches),
            world=self.world,
            bytes_of_token_V=self.data.bytes_of_token_V,
            reuse_training_graph=self.built.compiled and self.world.device.type == "cpu",
        )
        for callback in self.callbacks:
            callback.on_validation(number, result, time.perf_counter() - started)
        return result

    def _save_checkpoint(self, last: StepResult, validation: ValidationResult | None) -> float:
        """Starts a save and returns the seconds for which it held the loop up."""
        started = time.perf_counter()
        if self._save is not None:  # saving takes longer than the steps between two saves
            self._save.wait()
            self._report_save()
        record: dict[str, Any] = {"loss": last.loss}
        if validation is not None:
            record |= {
                "val_loss": validation.loss,
                "val_bits_per_byte": validation.bits_per_byte,
                "val_step": self._validated_step,
            }
        self._save = self.checkpoints.save(
            self.progress, record=record, asynchronous=self.config.checkpoint.asynchronous
        )
        return time.perf_counter() - started

    def _report_save(self) -> None:
        if self._save is not None and self._save.done:
            info = self._save.wait()
            self._save = None
            self._tell("checkpoint", step=info.step, path=str(info.path))

    def _tell(self, event: str, **details: object) -> None:
        for callback in self.callbacks:
            callback.on_event(event, **details)

    def _micro_batches(self, batch: Batch) -> Iterator[TokenBatch]:
        whole = self._to_device(batch).share(self._mesh.axis("cp"))
        for start in range(0, self._share, self._micro):
            yield whole.rows(slice(start, start + self._micro))

    def _to_device(self, batch: Batch) -> TokenBatch:
        tensors = [torch.from_numpy(array) for array in (batch.tokens_BS, batch.labels_BS, batch.document_ids_BS)]
        if self.world.device.type == "cuda":
            tensors = [tensor.pin_memory().to(self.world.device, non_blocking=True) for tensor in tensors]
        return TokenBatch(
            tokens_BS=tensors[0],
            labels_BS=tensors[1],
            document_ids_BS=tensors[2] if self.data.document_mask else None,
        )


class _Speed:
    """Tokens a second over the steps that were added."""

    def __init__(self) -> None:
        self._tokens = 0
        self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self._tokens += tokens
        self._seconds += seconds

    @property
    def tokens_per_s(self) -> float | None:
        return self._tokens / self._seconds if self._seconds else None


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
