"""The `[train]` section of a run's configuration. Imports without torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_SECTION = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class OptimizerConfig(BaseModel):
    """How gradients become updates."""

    model_config = _SECTION

    name: Literal["adamw", "muon"] = "adamw"
    """`adamw` for everything, or `muon` for the matrices inside the blocks and AdamW for the rest."""
    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices; embeddings, norms and routers have none."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to AdamW's denominator."""
    muon_lr: float = Field(default=0.02, gt=0)
    """Peak learning rate of Muon; an update's root mean square is 0.2 * muon_lr in each element."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of Muon's (Nesterov) momentum."""


class ScheduleConfig(BaseModel):
    """How the learning rates move over the run; the factor multiplies every peak rate."""

    model_config = _SECTION

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: `cosine` falls over the rest of the run; `wsd` stays, then falls linearly; `constant` stays."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps of linear rise from zero."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of all steps, at the end, in which `wsd` falls."""
    final_factor: float = Field(default=0.1, ge=0, le=1)
    """Factor at the last step."""


class ValidationConfig(BaseModel):
    """Loss on held-out text."""

    model_config = _SECTION

    every_steps: int = Field(default=100, ge=0)
    """Steps between validations; 0: only after the last step."""
    max_samples: int = Field(default=0, ge=0)
    """Held-out samples of a validation during the run; 0: all. The one after the last step always takes all."""


class CheckpointConfig(BaseModel):
    """When the run's state is saved, and how much is kept."""

    model_config = _SECTION

    every_steps: int = Field(default=100, ge=0)
    """Steps between saves; 0: only at the end, and when the run is stopped."""
    keep_last: int = Field(default=3, ge=1)
    """Newest complete checkpoints to keep."""
    asynchronous: bool = True
    """Write in the background while training goes on."""


class ActivationMemoryConfig(BaseModel):
    """What a block keeps of its forward pass for the backward; less memory costs recomputation or copying."""

    model_config = _SECTION

    mode: Literal["none", "selective", "full", "offload"] = "none"
    """`none` keeps everything; `selective` keeps the results of the operations in `save` and recomputes the rest; `full`
    keeps a block's input alone and recomputes the block; `offload` keeps everything in the host's memory."""
    every_n_layers: int = Field(default=1, gt=0)
    """Only each n-th block of the model is treated so, from the first one on; the others keep everything."""
    save: tuple[Literal["matmul", "attention", "collective"], ...] = ("matmul", "attention", "collective")
    """`selective` only: operations whose results are kept. `collective` means that no communication is repeated."""


class LogConfig(BaseModel):
    """What the run records about itself."""

    model_config = _SECTION

    every_steps: int = Field(default=10, gt=0)
    """Steps between progress lines; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write TensorBoard events."""


class TrainConfig(BaseModel):
    """The training run: how long, how large a batch, in which precision."""

    model_config = _SECTION

    steps: int = Field(default=1000, gt=0)
    """Optimizer steps of the whole run."""
    global_batch_size: int = Field(default=32, gt=0)
    """Samples in one optimizer step, over all ranks."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Samples of one forward pass on one rank; the rest of the rank's share is accumulated. Left out: all at
    once; one at a time in a pipeline."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of activations and matrix products. Weights, gradients' sums and optimizer state are float32 in both."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each block: `auto` compiles where a compiler is installed, and says so where none is."""
    attention: Literal["auto", "sdpa", "explicit"] = "auto"
    """How attention is computed: `sdpa` by torch's fused kernels; `explicit` makes the matrix of scores, which takes memory
    quadratic in data.seq_len; `auto` takes `explicit` on CPUs for rows up to 256 tokens when compiled, else `sdpa`."""
    clip_grad_norm: float = Field(default=1.0, gt=0)
    """Largest global gradient norm; larger gradients are scaled down to it."""
    max_skipped_steps: int = Field(default=10, gt=0)
    """Consecutive steps with NaN or infinite gradients (each is skipped) after which the run ends with an error."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """The optimizer."""
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    """The learning-rate schedule."""
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    """Validation."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Checkpoints."""
    activation_memory: ActivationMemoryConfig = Field(default_factory=ActivationMemoryConfig)
    """Memory of activations."""
    log: LogConfig = Field(default_factory=LogConfig)
    """Records."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.micro_batch_size is not None and self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of "
                f"micro_batch_size ({self.micro_batch_size})"
            )
        return self
