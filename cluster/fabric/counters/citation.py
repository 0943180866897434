"""Which counters speak for a finding, and which against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.fabric.findings import Kind


@dataclass(frozen=True, kw_only=True)
class Citation:
    """What a host's counters say of a finding about it: short sentences, each with its number."""

    supports: tuple[str, ...]
    contradicts: tuple[str, ...]

    def as_data(self) -> dict[str, list[str]]:
        """For a finding's evidence, under `counters`."""
        return {"supports": list(self.supports), "contradicts": list(self.contradicts)}


def cite(kind: Kind, growth: Mapping[str, float], *, others: Sequence[Mapping[str, float]] = ()) -> Citation:
    """What counters say of a finding of `kind`.

    growth: of the host that the finding names, over the measurement (for several hosts, use `add_up`).
    others: of the hosts that it does not name, over the same time. With them a counter is cited only where it grew
        clearly more than theirs: most counters grow on healthy hosts as well.
    """
    return Citation(supports=(), contradicts=())
