"""`transformers.Trainer` on the same work as one of our jobs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from data_pipeline.dataset import PackedDataset
from data_pipeline.prepared import PreparedData
from megamodel.convert.hf_config import family_for, to_hf_config
from megamodel.model.size import model_size
from megamodel.train.job import TrainingJob


@dataclass(frozen=True, kw_only=True)
class PeerSetting:
    """How the peer runs, and whom it tells of each step."""

    compiled: bool
    output: Path
    done: Callable[[], None]


class RowsForTransformers(Dataset[dict[str, torch.Tensor]]):
    """Rows of tokens; the labels are the same ones, since its models shift them."""

    def __init__(self, rows: PackedDataset) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.from_numpy(self._rows[index].tokens_S)
        return {"input_ids": tokens, "labels": tokens}


def transformers_trainer(job: TrainingJob, prepared: PreparedData, setting: PeerSetting) -> Callable[[], None]:
    """The loop of `transformers.Trainer` with its defaults, except what makes the work equal or costs it time:
    same batch, bf16, AdamW with our rates, constant schedule; no reports, saves or progress bar."""
    # accelerate imports DeepSpeed where it is installed, which tells stdout what it takes for the device unless it is told.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Timed(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            setting.done()

    def loop() -> None:
        optimizer = job.train.optimizer
        raw = to_hf_config(job.model, family_for(job.model), "float32")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
        theirs = sum(parameter.numel() for parameter in model.parameters())
        assert theirs == model_size(job.model).total, f"{theirs} parameters against {model_size(job.model).total}"
        arguments = TrainingArguments(
            output_dir=str(setting.output),
            max_steps=job.train.steps,
            per_device_train_batch_size=job.train.global_batch_size,
            bf16=job.train.precision == "bf16",
            use_cpu=job.device == "cpu" or not torch.cuda.is_available(),
            torch_compile=setting.compiled,
            learning_rate=optimizer.lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            max_grad_norm=job.train.clip_grad_norm,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows = RowsForTransformers(PackedDataset(prepared, "train", job.data.seq_len))
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Timed()]).train()

    return loop
