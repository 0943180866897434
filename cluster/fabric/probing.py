"""What can be asked of a fabric, real or simulated. The diagnosis knows this interface and nothing of what is behind it.

Endpoints are addressed by their index in `Fabric.endpoints`. Imports without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Flows = NDArray[np.intp]
"""(F, 2): sender and receiver of each flow."""
Figures = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One rank that sends and receives for its host (for one rail of it, where a host has several)."""

    rank: int
    host: str
    machine: str
    """Ranks with the same machine share its cores, whatever their host's name: they take turns where compute is timed."""
    rail: int = 0
    leaf: str | None = None
    """Name of its leaf switch, where the topology is known."""


class UnresponsiveError(Exception):
    """Some ranks do not answer on the side channel any more, or never did. `ranks` are world ranks."""

    def __init__(self, ranks: Sequence[int], during: str) -> None:
        self.ranks = tuple(ranks)
        self.during = during
        super().__init__(f"rank(s) {', '.join(map(str, ranks))} did not answer during {during}")


class StalledError(Exception):
    """All ranks answer on the side channel, and a transfer or a collective does not complete.

    `flows`: world ranks, sender and receiver, of each transfer. `ranks`: world ranks that waited until their time was up,
    which is all that is known where ranks connect or run a collective: then there are no flows.
    """

    def __init__(self, flows: Sequence[tuple[int, int]], during: str, *, ranks: Sequence[int] = ()) -> None:
        self.flows = tuple(flows)
        self.ranks = tuple(ranks)
        self.during = during
        listing = ", ".join(f"{sender}->{receiver}" for sender, receiver in flows)
        said = (
            f"transfers {listing} did not complete" if flows else f"rank(s) {', '.join(map(str, ranks))} waited in vain"
        )
        super().__init__(f"{said} during {during}")


class Fabric(Protocol):
    """Measurements on a set of endpoints. Every method is one round; raises UnresponsiveError or StalledError."""

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """All of them; an index into this addresses one."""
        ...

    @property
    def seconds(self) -> float:
        """Since the first measurement: of the wall's clock, or of the simulated one."""
        ...

    def compute(self, who: Sequence[int], *, work_s: float) -> Figures:
        """(len(who),) seconds that each needed for one fixed piece of work, which takes a healthy endpoint about `work_s`.

        The same piece of work for the same `work_s`, on every endpoint and in every call.
        """
        ...

    def transfer(self, flows: Flows, *, num_bytes: int) -> Figures:
        """(F,) bytes a second of each flow, all flows at once, each of `num_bytes`, as its receiver saw it once it ran.

        An endpoint may send and receive in several flows. Start-up time is not in it.
        """
        ...

    def round_trip(self, pairs: Flows, *, repeats: int) -> Figures:
        """(F,) seconds of a small message there and back, all pairs at once: the median of `repeats`."""
        ...

    def counters(self) -> Sequence[Mapping[str, float]]:
        """For each endpoint, by how much each counter of its host has grown since the last call; empty where it has none.

        Names are `area/device/name`, such as `infiniband/mlx5_0:1/port_xmit_wait`. The first call starts the count.
        """
        ...
