"""The `[fabric]` section of a run's configuration. Imports without torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class FabricConfig(BaseModel):
    """How a run watches its own communication: hangs, stragglers, slow groups."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    monitor: Literal["auto", "on", "off"] = "auto"
    """Watch the run: a process beside each host's ranks names who hangs and who is slow. `auto` is on with more than one
    rank. Numbers that a run computes do not depend on it."""

    hang_seconds: float = Field(default=8.0, gt=0.0)
    """Seconds for which a rank may be missing from a collective before it is named. Waits that are usual for the run, such
    as those around a checkpoint, raise this by themselves. Nothing is ended: it is only told."""

    window_steps: int = Field(default=10, ge=2)
    """Steps in one window. Only what lasts for three windows is told as a straggler, a slow group or a change."""

    prometheus_port: int | None = Field(default=None, ge=1, le=65535)
    """Port on rank 0's host, on all its interfaces, that serves the monitor's figures to Prometheus; none: no port is opened."""

    profile: str | None = Field(default=None, min_length=1)
    """File that `mega fabric sweep --output` wrote on this cluster: a run then tells how long its communication should
    take, beside how long it takes."""

    def watches(self, num_ranks: int) -> bool:
        """Whether a run of `num_ranks` ranks is watched."""
        return self.monitor == "on" or (self.monitor == "auto" and num_ranks > 1)
