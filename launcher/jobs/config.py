"""The `[launch]` and `[slurm]` sections of a run's configuration. Imports without torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

_SECTION = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
# What a pattern means, for who has missed it.
_TIME: dict[str, JsonValue] = {"form": "minutes, HH:MM:SS or D-HH:MM:SS"}
_MEMORY: dict[str, JsonValue] = {"form": "a number, in megabytes or with K, M, G or T, such as 512G"}


class PreflightConfig(BaseModel):
    """What is looked at before the first step of each attempt of `mega launch`."""

    model_config = _SECTION

    enabled: bool = True
    """Compare versions and environment of all ranks, try devices, disks and clocks, and measure the fabric."""
    fabric: bool = True
    """Measure the fabric too, as `mega fabric diagnose` does: a few seconds."""
    on_bad_host: Literal["exclude", "stop", "warn"] = "exclude"
    """`exclude` goes on without it, with a spare or with fewer hosts, or asks the scheduler for others; `stop` ends the job;
    `warn` only tells."""
    max_clock_offset_seconds: float = Field(default=5.0, gt=0.0)
    """Largest difference between two hosts' clocks: logs, and files' times, are compared by them."""
    min_free_disk_gb: float = Field(default=1.0, ge=0.0)
    """Least free space where the run is written, in 10^9 bytes."""


class LaunchConfig(BaseModel):
    """How `mega launch` starts the run on hosts, and what it does when something fails."""

    model_config = _SECTION

    nodes: int = Field(default=1, ge=1)
    """Hosts that train."""
    min_nodes: int | None = Field(default=None, ge=1)
    """Fewest hosts to go on with when others are lost and no spare is left; the layout must allow it. Left out: `nodes`."""
    ranks_per_node: int | None = Field(default=None, ge=1)
    """Ranks on each host. Left out: one a GPU; one where there is none."""
    network: Literal["auto", "infiniband", "roce", "socket"] = "auto"
    """What NCCL must use between hosts: where `infiniband` or `roce` cannot be had the job does not start. `auto` takes what the
    hosts have, and is then as strict."""
    preflight: PreflightConfig = Field(default_factory=PreflightConfig)
    """Checks before the first step."""
    max_attempts_without_progress: int = Field(default=3, ge=1)
    """Attempts in a row that end without a new checkpoint before the job ends with their cause."""
    restart_delay_seconds: float = Field(default=1.0, ge=0.0)
    """Wait before a new attempt; doubled, up to a minute, while attempts make no progress."""
    start_timeout_seconds: float = Field(default=120.0, gt=0.0)
    """How long all hosts may take to appear in an attempt. Who has not appeared is named, and left out where possible."""
    lost_host_seconds: float = Field(default=15.0, gt=1.0)
    """Silence after which a host counts as lost. Its ranks end by themselves after the same time without a word of the head."""
    end_hangs_after_seconds: float = Field(default=10.0, gt=0.0)
    """How long the run may make no step after the watch has named a hang, before the attempt is ended and another one
    started; eight times as long where the rank that is missed works. `inf`: hangs are only told."""
    save_seconds: float = Field(default=60.0, gt=0.0)
    """How long ranks may take to save and end once asked to stop, before they are killed. Where SLURM wants the hosts back they
    may take all the time that it gives, if that is more."""
    wait_for_hosts_seconds: float = Field(default=300.0, ge=0.0)
    """How long to wait for lost hosts to come back where too few are left, before the job is requeued, or ends."""
    max_rank_log_mb: float = Field(default=100.0, gt=0.0)
    """Largest log of one rank in an attempt, in 10^6 bytes; what comes after it is dropped, and that is said."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes ({self.min_nodes}) must not be more than nodes ({self.nodes})")
        return self

    @property
    def fewest_nodes(self) -> int:
        """Hosts without which there is no attempt."""
        return self.min_nodes or self.nodes


class ContainerConfig(BaseModel):
    """The container in which ranks run."""

    model_config = _SECTION

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    """`none` runs the Python that `mega launch` runs in, which every host must see; `pyxis` is SLURM's plugin for enroot."""
    image: str | None = Field(default=None, min_length=1)
    """Image: a file that all hosts see; for pyxis also one of a registry, as it names it: docker://..."""
    mounts: tuple[str, ...] = ()
    """Folders of the host that the container sees, as `/source:/target` or `/both`. The working directory and the run's
    folder are mounted always."""
    python: str = Field(default="python3", min_length=1)
    """Python within the image that has this package."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.runtime == "none") != (self.image is None):
            raise ValueError("runtime and image go together: set both, or none")
        return self


class SlurmConfig(BaseModel):
    """What `mega launch --on slurm` asks SLURM for."""

    model_config = _SECTION

    partition: str | None = Field(default=None, min_length=1)
    """Partition (queue). Left out: the cluster's default."""
    account: str | None = Field(default=None, min_length=1)
    """Account that is charged."""
    qos: str | None = Field(default=None, min_length=1)
    """Quality of service."""
    time: str | None = Field(default=None, pattern=r"^(\d+-)?\d+(:\d+){0,2}$", json_schema_extra=_TIME)
    """Time limit of one start of the job, as SLURM writes it: minutes, HH:MM:SS, D-HH. Before it the run saves and is
    requeued."""
    nodes: int | None = Field(default=None, ge=1)
    """Hosts to ask for; those beyond launch.nodes are spares. Left out: launch.nodes."""
    gpus: int | None = Field(default=None, ge=0)
    """GPUs of each host (--gpus-per-node). Left out: none is asked for."""
    cpus_per_rank: int | None = Field(default=None, ge=1)
    """Cores of each rank. Left out: as the partition has it."""
    memory: str | None = Field(default=None, pattern=r"^\d+[KMGT]?$", json_schema_extra=_MEMORY)
    """Main memory of each host (--mem), such as 512G; 0 is all of it."""
    constraint: str | None = Field(default=None, min_length=1)
    """Features that hosts must have."""
    exclusive: bool = True
    """Hosts are shared with no other job."""
    exclude: str | None = Field(default=None, min_length=1)
    """Hosts not to take, such as n[3,7-8]; those that preflight has found bad are added."""
    mail_user: str | None = Field(default=None, min_length=3)
    """Whom SLURM writes to."""
    mail_type: str = Field(default="FAIL,END", min_length=3)
    """When it does, where mail_user is set."""
    signal_seconds: int = Field(default=120, ge=5)
    """How long before the time limit the run is asked to save: more than a save takes."""
    requeue: bool = True
    """Go on in a new start of the job after preemption, the time limit, and where hosts are too few or bad."""
    max_requeues: int = Field(default=50, ge=0)
    """Starts of the job after the first, at most."""
    mpi: Literal["none", "pmix"] = "none"
    """`pmix` starts one task a rank with srun --mpi=pmix, so that programs in a rank may use MPI."""
    extra_lines: tuple[str, ...] = ()
    """More lines for the head of the batch script, such as "#SBATCH --reservation=night"."""
    setup_lines: tuple[str, ...] = ()
    """Shell lines that the batch script runs first, such as "module load cuda"."""
    srun_options: tuple[str, ...] = ()
    """More options for each srun step."""
    template: str | None = Field(default=None, min_length=1)
    """A jinja2 file that takes the place of the batch script's template (`mega launch --show-template` prints that)."""
    container: ContainerConfig = Field(default_factory=ContainerConfig)
    """The container in which ranks run."""
