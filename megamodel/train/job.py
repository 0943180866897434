"""What training is asked for, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cluster.config import FabricConfig
from data_pipeline.config import DataConfig
from megamodel.model.config import ModelConfig
from megamodel.train.config import TrainConfig
from parallel.config import ParallelConfig

if TYPE_CHECKING:
    from megamodel.train.communication import StepCommunication


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """Everything that decides a run. Imports without torch."""

    run_directory: Path
    seed: int
    device: Literal["auto", "cpu", "cuda"]
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig
    train: TrainConfig
    fabric: FabricConfig = field(default_factory=FabricConfig)
    """How the run watches its own communication."""
    trace_communication: bool = False
    """Count what the first steps of this start send, and hold it against the formulas."""

    def traced(self) -> TrainingJob:
        """This job with its communication traced, and without torch.compile: what a compiled region sends is not seen."""
        return replace(self, train=self.train.model_copy(update={"compile": "off"}), trace_communication=True)


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a run ended. Losses are in nats a token; `tokens` counts the whole run, `tokens_per_s` this start of it."""

    run_directory: Path
    steps: int
    finished: bool
    """False: stopped early by a signal, after saving."""
    trained: bool
    """False: this start found the run finished, and made no step."""
    final_loss: float | None
    val_loss: float | None
    val_bits_per_byte: float | None
    tokens: int
    tokens_per_s: float | None
    baselines: dict[str, float]
    """Bits per byte of general compressors on the same held-out bytes."""
    communication: tuple[StepCommunication, ...] = ()
    """Of the steps that were traced."""
