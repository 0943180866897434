"""Who a measuring process is in its world, and how it measures. Imports without torch; a launcher fills both in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TransportChoice = Literal["auto", "gloo", "nccl", "mpi"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, kw_only=True)
class FabricPlace:
    """One rank's place in the world that measures."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    """`host:port` of the meeting point. Rank 0 listens there, or a torchrun agent does (`agent_store`)."""
    host: str
    """Name of this rank's host, in findings and exclude files."""
    agent_store: bool = False
    """Whether somebody else keeps a torch TCPStore at `address` already, as torchrun's agent does."""
    hosts: tuple[str, ...] = ()
    """Host of each rank, where the launcher knows them all: then a rank that never came has a name. Else empty."""
    leaf: str | None = None
    """Name of the leaf switch that this rank's host hangs on, where the launcher knows it."""


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """How to measure. The same on every rank, which is checked; the place may differ."""

    transport: TransportChoice = "auto"
    """auto: nccl where every rank has a CUDA device of its own, else gloo."""
    rails: bool = False
    """Measure from every local rank, a rail each, instead of from one rank of each host."""
    start_timeout_s: float = 60.0
    """How long ranks wait for one another at the start."""
    silence_s: float = 6.0
    """A rank that has sent no sign of life for so long counts as gone. Ranks send two a second."""
    round_timeout_s: float = 20.0
    """How long one measurement may take before it counts as stalled."""
    interface: str | None = None
    """Network interface to measure, for gloo. None: the one that leads to rank 0."""
    counter_root: str | None = "/"
    """Folder below which the counters of a host are read. None: no counters."""
    lazy: bool = False
    """Connect at the first measurement, not at the start: ranks can be asked what they are before that, and whoever asks
    compares the versions of torch."""

    @property
    def agreed(self) -> dict[str, object]:
        """What every rank must have the same, for the comparison at the start."""
        return {
            "transport": self.transport,
            "rails": self.rails,
            "silence_s": self.silence_s,
            "round_timeout_s": self.round_timeout_s,
        }


def machine_id() -> str:
    """An identity that ranks on one machine share, in whatever namespaces or containers they run."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return "unknown"
