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
from megamodel.train.layout import layout_demands
from parallel.config import ParallelConfig
from parallel.layout_check import layout_problems


@dataclass(frozen=True, kw_only=True)
class RunLayout:
    """What the checks look at."""

    num_ranks: int | None
    """None: it does not matter here how the run is laid out."""
    device: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    parallel: ParallelConfig
    export: ExportConfig


def cross_checks(layout: RunLayout) -> Iterator[Complaint]:
    """Everything that does not fit together."""
    yield from _layout_is_possible(layout)
    yield from _rows_fit_model(layout)
    yield from _vocabulary_fits_model(layout)
    yield from _model_can_be_exported(layout)


def _layout_is_possible(layout: RunLayout) -> Iterator[Complaint]:
    if layout.num_ranks is None:
        return
    demands = layout_demands(layout.model, layout.train, seq_len=layout.data.seq_len, device=layout.device)
    for problem in layout_problems(layout.parallel, demands, layout.num_ranks):
        yield Complaint(keys=problem.keys, message=problem.message)


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
