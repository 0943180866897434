"""The configuration of a whole run: every leaf's section, and the launcher's own. Imports without torch."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.config import FabricConfig
from data_pipeline.config import DataConfig
from launcher.checks import RunLayout, cross_checks
from launcher.config_loading import Complaint, LoadedConfig, load_config
from launcher.jobs.config import LaunchConfig, SlurmConfig
from launcher.toml_writing import to_toml
from megamodel.convert.config import ExportConfig
from megamodel.generate.config import GenerateConfig
from megamodel.model.config import ModelConfig
from megamodel.train.config import TrainConfig
from megamodel.train.job import TrainingJob
from parallel.config import ParallelConfig

_SECTION = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RunSection(BaseModel):
    """Which run this is, and where it happens."""

    model_config = _SECTION

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder. The same name continues the run; another one starts another."""
    directory: str = Field(default="runs", min_length=1)
    """Folder that holds the folders of runs, relative to the working directory."""
    seed: int = Field(default=1234, ge=0)
    """Decides the initial weights and the order of the samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA devices where there are any, else the processor."""


class RunConfig(BaseModel):
    """Everything that decides a run. A resolved one, written as TOML, repeats the run."""

    model_config = _SECTION

    run: RunSection = Field(default_factory=RunSection)
    """Which run this is, and where it happens."""
    model: ModelConfig
    """Shape of the decoder. Start from a preset: `preset = "moe-7m"`; the fields given beside it replace the preset's."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Where the text comes from, and how it becomes rows of tokens."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """How long, how large a batch, which optimizer, and what is recorded."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """How the model is spread over the ranks."""
    fabric: FabricConfig = Field(default_factory=FabricConfig)
    """How the run watches its own communication."""
    generate: GenerateConfig = Field(default_factory=GenerateConfig)
    """How text is sampled, after training and by `mega generate`."""
    export: ExportConfig = Field(default_factory=ExportConfig)
    """What a finished run is exported to."""
    launch: LaunchConfig = Field(default_factory=LaunchConfig)
    """How `mega launch` starts the run on hosts, and what it does when something fails."""
    slurm: SlurmConfig = Field(default_factory=SlurmConfig)
    """What `mega launch --on slurm` asks SLURM for."""

    @property
    def run_directory(self) -> Path:
        """The folder of this run."""
        return Path(self.run.directory).expanduser() / self.run.name

    @property
    def training_job(self) -> TrainingJob:
        """The part of this that training asks for."""
        return TrainingJob(
            run_directory=self.run_directory,
            seed=self.run.seed,
            device=self.run.device,
            model=self.model,
            data=self.data,
            parallel=self.parallel,
            train=self.train,
            fabric=self.fabric,
        )

    def as_data(self) -> dict[str, Any]:
        """Every key with its value, as plain data; keys whose value is None are there too."""
        return self.model_dump(mode="json")


def load_run_config(
    files: Sequence[Path], overrides: Sequence[str] = (), *, num_ranks: int | None = None
) -> LoadedConfig[RunConfig]:
    """The configuration of a run from TOML `files` and `--set` arguments, for a world of `num_ranks` ranks; None: for
    reading only, on as many ranks as may be, so that the layout is not checked.

    Raises ConfigError with every problem, those between sections included.
    """

    return load_config(
        RunConfig, files, overrides, cross_checks=lambda config: layout_complaints(config, num_ranks=num_ranks)
    )


def layout_complaints(config: RunConfig, *, num_ranks: int | None) -> Iterable[Complaint]:
    """What does not fit together in a world of `num_ranks` ranks."""
    return cross_checks(
        RunLayout(
            num_ranks=num_ranks,
            device=config.run.device,
            model=config.model,
            data=config.data,
            train=config.train,
            parallel=config.parallel,
            export=config.export,
        )
    )


def resolved_toml(config: RunConfig, origins: Mapping[str, str] | None = None) -> str:
    """The whole configuration as TOML, with where each key was set behind it where `origins` tells."""
    text = to_toml(config.as_data(), note=lambda path: (origins or {}).get(".".join(path), ""))
    # What a None left out stands for must be its default, or the file would not repeat the run.
    assert RunConfig.model_validate(tomllib.loads(text)) == config, "a resolved configuration must read back as itself"
    return text
