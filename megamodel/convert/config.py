"""The `[export]` section: which format a finished run is written in. Imports without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ExportConfig(BaseModel):
    """Export of the trained weights."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    format: Literal["hf", "none"] = "hf"
    """What a finished run is exported to: a folder that Hugging Face transformers loads, or nothing."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of the exported weights; logits are compared in fp32 either way, with the weights as exported."""
    max_shard_bytes: int = Field(default=5 * 10**9, gt=0)
    """Largest weight file in bytes; a single tensor that is larger gets a file of its own."""
