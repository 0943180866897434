"""Records on disk: metrics.jsonl, events.jsonl and TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from megamodel.train.callbacks.base import Callback, RunFacts, StepRecord
from megamodel.train.run_directory import RunDirectory
from megamodel.train.step import RouterReport
from megamodel.train.validation import ValidationResult


def load_entropy(counts_E: Tensor) -> float:
    """Entropy of the experts' load divided by its largest value: 1 is perfect balance, 0 is one expert for all."""
    share_E = counts_E.double() / counts_E.sum()
    entropy = float(torch.special.entr(share_E).sum())
    return entropy / math.log(len(counts_E)) if len(counts_E) > 1 else 1.0


class JsonlRecords(Callback):
    """One JSON object a step, and one a validation, in metrics.jsonl; what happens in events.jsonl."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory

    def on_step(self, record: StepRecord) -> None:
        """Losses in full precision: comparing two runs bit by bit needs nothing else."""
        result = record.result
        line: dict[str, Any] = {
            "step": record.step,
            "tokens": record.tokens,
            "epoch": record.epoch,
            "loss": _finite(result.loss),
            "grad_norm": _finite(result.grad_norm),
            "lr": record.lr,
            "step_time_s": record.step_time_s,
            "data_s": record.data_s,
            "compute_s": result.compute_s,
            "update_s": result.update_s,
            "save_s": record.save_s,
            "tokens_per_s": record.tokens_per_s,
            "model_tflops_per_s": record.model_flops_per_s / 1e12,
            "mfu": record.mfu,
            "memory_bytes": record.memory_bytes,
            "skipped": result.skipped,
            "skipped_steps": record.skipped_steps,
        }
        if result.pipeline_bubble is not None:
            line["pipeline_bubble"] = result.pipeline_bubble
        if result.router is not None:
            line["router_loss"] = _finite(result.router.loss)
            line["expert_counts"] = result.router.counts_LE.tolist()
            line["router_entropy"] = result.router.entropy_L.tolist()
        self._directory.append_metrics(line)

    def on_validation(self, step: int, result: ValidationResult, seconds: float) -> None:
        """`val_loss` in nats a token, `val_bits_per_byte` of text."""
        self._directory.append_metrics(
            {
                "step": step,
                "val_loss": _finite(result.loss),
                "val_bits_per_byte": _finite(result.bits_per_byte),
                "val_tokens": result.num_tokens,
                "val_bytes": result.num_bytes,
                "validation_s": seconds,
            }
        )

    def on_event(self, event: str, **details: object) -> None:
        """One line, with the time."""
        self._directory.append_event(event, **details)


class TensorBoardRecords(Callback):
    """Scalars under loss, optim, throughput, time, memory, moe and data."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._writer: SummaryWriter | None = None

    def on_start(self, facts: RunFacts) -> None:
        """Hides what an earlier start recorded beyond the checkpoint that this one continues from."""
        self._writer = SummaryWriter(str(self._directory.tensorboard), purge_step=facts.first_step)

    def on_step(self, record: StepRecord) -> None:
        """The figures of metrics.jsonl, as tags."""
        result = record.result
        scalars = {
            "loss/train": result.loss,
            "optim/grad_norm": result.grad_norm,
            "optim/lr": record.lr,
            "optim/skipped_steps": record.skipped_steps,
            "throughput/tokens_per_s": record.tokens_per_s,
            "throughput/model_tflops_per_s": record.model_flops_per_s / 1e12,
            "time/step_s": record.step_time_s,
            "time/data_s": record.data_s,
            "time/compute_s": result.compute_s,
            "time/update_s": result.update_s,
            "time/save_s": record.save_s,
            "memory/peak_bytes": record.memory_bytes,
            "data/tokens": record.tokens,
            "data/epoch": record.epoch,
            "data/valid_fraction": result.num_valid_tokens / result.num_tokens,
        }
        if record.mfu is not None:
            scalars["throughput/mfu"] = record.mfu
        if result.pipeline_bubble is not None:
            scalars["throughput/pipeline_bubble"] = result.pipeline_bubble
        if result.router is not None:
            scalars |= _router_scalars(result.router)
        self.add(scalars, record.step)

    def on_validation(self, step: int, result: ValidationResult, seconds: float) -> None:
        """Beside the training loss."""
        self.add(
            {"loss/val": result.loss, "loss/val_bits_per_byte": result.bits_per_byte, "time/validation_s": seconds},
            step,
        )

    def close(self) -> None:
        """Writes what is still in memory."""
        if self._writer is not None:
            self._writer.close()

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Scalars by tag, of one step."""
        if self._writer is not None:
            for tag, value in scalars.items():
                self._writer.add_scalar(tag, value, step)


def _router_scalars(router: RouterReport) -> dict[str, float]:
    scalars = {"moe/router_loss": router.loss}
    for layer, (counts_E, entropy) in enumerate(zip(router.counts_LE, router.entropy_L, strict=True)):
        prefix = f"moe/layer_{layer}"
        scalars[f"{prefix}/router_entropy"] = float(entropy)
        scalars[f"{prefix}/load_entropy"] = load_entropy(counts_E)
        for expert, share in enumerate((counts_E.double() / counts_E.sum()).tolist()):
            scalars[f"{prefix}/load_expert_{expert}"] = share
    return scalars


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
