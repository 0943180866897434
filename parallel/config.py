"""The `[parallel]` section of a run's configuration. Imports without torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

DataEngine = Literal["ddp", "fsdp2", "deepspeed"]
PipelineSchedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]
ContextMethod = Literal["all_gather", "ring", "ulysses"]
Offload = Literal["none", "cpu", "nvme"]

_SECTION = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DeepSpeedConfig(BaseModel):
    """What DeepSpeed shards, and where it keeps it (`data_engine = "deepspeed"` only)."""

    model_config = _SECTION

    zero_stage: Literal[1, 2, 3] = 2
    """What is sharded over the data ranks (Rajbhandari et al. 2020): 1 optimizer state; 2 gradients too; 3 parameters too."""

    offload_optimizer: Offload = "none"
    """Where the optimizer state lies: on the device, in CPU memory (the step is then taken there), or in files on NVMe."""

    offload_parameters: Offload = "none"
    """Where parameters lie while they are not used: on the device, in CPU memory, or in files on NVMe. Stage 3 only."""

    nvme_path: str | None = Field(default=None, min_length=1)
    """A folder on a disk local to each host. Needed where anything is offloaded to `nvme`."""


class ParallelConfig(BaseModel):
    """How one model is spread over the ranks of a run: pp * dp_replicate * dp_shard * cp * tp of them."""

    model_config = _SECTION

    pp: int = Field(default=1, ge=1)
    """Ranks along the pipeline: each holds some of the layers."""

    dp_replicate: int = Field(default=1, ge=1)
    """Groups of data ranks that each hold the whole model between them; above 1 with `fsdp2` is hybrid sharding."""

    dp_shard: int = Field(default=-1, ge=-1)
    """Data ranks in one such group, over which `fsdp2` and `deepspeed` shard; -1: all ranks that the other axes leave."""

    cp: int = Field(default=1, ge=1)
    """Ranks that share each row of tokens along its length."""

    tp: int = Field(default=1, ge=1)
    """Ranks that share each matrix of the layers, the embedding and the loss; between the layers they share the row."""

    ep: int = Field(default=1, ge=1)
    """Ranks over which the experts are dealt out. Folds dp_shard * cp * tp: needs no ranks of its own."""

    expert_tp: int = Field(default=1, ge=1)
    """Ranks that share each expert's matrices. Folds dp_shard * cp * tp together with `ep`."""

    pipeline_schedule: PipelineSchedule = "1f1b"
    """Order of the micro batches in the pipeline. `gpipe` and `1f1b` hold one stage a rank, the `interleaved` ones two or
    more in turn; `zbv` and `dualpipev` hold two, laid out like a V. All after `1f1b` trade messages for less idle time."""

    pipeline_stages_per_rank: int | None = Field(default=None, ge=1)
    """Stages that a rank holds. Left out: 1 for `gpipe` and `1f1b`, else 2."""

    pipeline_split: list[int] | None = None
    """Layers of each stage, in the order of the stages. Left out: cut where the most expensive stage is cheapest, with the
    embedding in the first and the head in the last one counted."""

    context_method: ContextMethod = "all_gather"
    """How attention sees the whole row under `cp`: gather all keys and values; pass them around a ring; or exchange rows
    for heads (`ulysses`; tp * cp must then divide the heads)."""

    async_tp: bool = False
    """Overlap tensor parallelism's communication with its matrix products. CUDA with torch.compile only."""

    data_engine: DataEngine = "ddp"
    """Data parallelism: `ddp` keeps this rank's part of the model whole on each of its data ranks; `fsdp2` shards
    parameters, gradients and optimizer state over them; `deepspeed` does so by ZeRO (needs the extra `deepspeed`). One
    process alone needs none of them, and ignores this."""

    reshard_after_forward: bool = True
    """`fsdp2` only. True frees a block's gathered parameters after its forward and gathers them again for the
    backward (least memory, ZeRO-3); false keeps them until the backward is over (less communication, ZeRO-2)."""

    cpu_offload: bool = False
    """`fsdp2` only. Parameters, gradients and optimizer state lie in CPU memory, and the optimizer steps there."""

    param_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which parameters are kept and updated. `bf16` halves their bytes, and loses updates below 1/256 of a weight."""

    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are summed over ranks. `bf16` halves the bytes sent and rounds the sum."""

    deepspeed: DeepSpeedConfig = Field(default_factory=DeepSpeedConfig)
    """DeepSpeed's settings."""

    timeout_seconds: float = Field(default=600.0, gt=0)
    """Seconds that a rank waits for the others in a collective before it gives up."""

    rendezvous_timeout_seconds: float = Field(default=3600.0, gt=0)
    """Seconds that a rank waits at the start for all others to come. Longer than the other, since hosts prepare data
    before they meet, each at its own speed."""

    @field_validator("dp_shard")
    @classmethod
    def _shard_is_a_degree(cls, value: int) -> int:
        if value == 0:
            raise ValueError("must be at least 1, or -1 for all ranks that the other axes leave")
        return value
