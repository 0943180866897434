"""Checks across sections: what no section can see alone. Their findings join the report on the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.config import DataConfig
from launcher.config_loading import Complaint
from megamodel.convert.config import ExportConfig
from megamodel.convert.hf_config import export_problems
from megamodel.model.config import ModelConfig
from megamodel.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunLayout:
    """What the checks look at."""

    num_ranks: int
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    export: ExportConfig


def cross_checks(layout: RunLayout) -> Iterator[Complaint]:
    """Everything that does not fit together."""
    yield from _batch_fits_ranks(layout)
    yield from _rows_fit_model(layout)
    yield from _vocabulary_fits_model(layout)
    yield from _model_can_be_exported(layout)


def _batch_fits_ranks(layout: RunLayout) -> Iterator[Complaint]:
    batch, micro, ranks = layout.train.global_batch_size, layout.train.micro_batch_size, layout.num_ranks
    keys = ("train.global_batch_size", "train.micro_batch_size")
    unit = ranks * (micro or 1)
    if micro is not None and batch % micro:
        return  # the section has said so
    if batch % unit:
        share = f"{ranks} ranks" if micro is None else f"{ranks} ranks of {micro} samples (train.micro_batch_size)"
        mend = f"use a multiple of {unit}, for example {max(1, round(batch / unit)) * unit}, or other ranks (--ranks)"
        yield Complaint(
            keys=keys, message=f"train.global_batch_size = {batch}: cannot be shared by {share} evenly; {mend}"
        )


def _rows_fit_model(layout: RunLayout) -> Iterator[Complaint]:
    row, longest = layout.data.seq_len, layout.model.max_seq_len
    if row > longest:
        yield Complaint(
            keys=("data.seq_len", "model.max_seq_len", "model.preset"),
            message=f"data.seq_len = {row}: longer than model.max_seq_len = {longest}; lower it, or raise that",
        )


def _vocabulary_fits_model(layout: RunLayout) -> Iterator[Complaint]:
    tokenizer = layout.data.tokenizer
    # The size of a given tokenizer is in its file; the trainer checks it when it has read it.
    if tokenizer.path is None and tokenizer.vocab_size > layout.model.vocab_size:
        yield Complaint(
            keys=("data.tokenizer.vocab_size", "model.vocab_size", "model.preset"),
            message=f"data.tokenizer.vocab_size = {tokenizer.vocab_size}: more than model.vocab_size = "
            f"{layout.model.vocab_size} rows of the embedding; lower it, or raise that",
        )


def _model_can_be_exported(layout: RunLayout) -> Iterator[Complaint]:
    """Not only after the last step."""
    problems = export_problems(layout.model) if layout.export.format == "hf" else []
    if problems:
        yield Complaint(
            keys=("export.format", "model"),
            message=f'export.format = "hf": no Hugging Face family known here expresses {"; ".join(problems)}; '
            'change that, or set export.format = "none"',
        )
