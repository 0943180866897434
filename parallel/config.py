"""The `[parallel]` section of a run's configuration. Imports without torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

DataEngine = Literal["ddp", "fsdp2"]


class ParallelConfig(BaseModel):
    """How one model is spread over the ranks of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    data_engine: DataEngine = "ddp"
    """Data parallelism: `ddp` keeps the whole model on every rank; `fsdp2` shards parameters, gradients and
    optimizer state over the ranks. One process alone needs neither, and ignores this."""

    reshard_after_forward: bool = True
    """`fsdp2` only. True frees a block's gathered parameters after its forward and gathers them again for the
    backward (least memory, ZeRO-3); false keeps them until the backward is over (less communication, ZeRO-2)."""

    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are summed over ranks. `bf16` halves the bytes sent and rounds the sum."""

    timeout_seconds: float = Field(default=600.0, gt=0)
    """Seconds that a rank waits for the others in a collective before it gives up."""

    rendezvous_timeout_seconds: float = Field(default=3600.0, gt=0)
    """Seconds that a rank waits at the start for all others to come. Longer than the other, since hosts prepare data
    before they meet, each at its own speed."""
