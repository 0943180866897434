"""Collectives that take the time that alpha and beta say, for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from cluster.fabric.bandwidth import bus_factor, message_steps
from cluster.fabric.groups import GroupSet, world_group
from cluster.fabric.measured.fabric import CollectiveTimes
from cluster.fabric.measured.transport import COLLECTIVE_KINDS, CollectiveKind
from cluster.fabric.probing import Endpoint
from cluster.fabric.sweep import SweepPlan, SweepResult, sweep

NOON = datetime(2026, 11, 16, 12, 0, 0, tzinfo=UTC)
SIZES = tuple(4**power for power in range(5, 13))


@dataclass
class FakeCollectives:
    """`Collectives` of a model: time = steps * alpha + factor * size * beta * slowness."""

    world_size: int = 8
    transport: str = "gloo"
    alpha_s: float = 20e-6
    beta_s_per_byte: float = 1e-9
    noise: float = 0.0
    run_noise: float = 0.0
    """Of everything in this run together."""
    seed: int = 0
    slow: Mapping[tuple[int, ...], float] = field(default_factory=dict)
    """Groups that need so many times as long for a byte."""
    together_slowness: float = 1.0
    compute_slowness: float = 1.0
    wrong: CollectiveKind | None = None
    calls: list[tuple[str, int, int, int, bool]] = field(default_factory=list)
    """Kind, size, groups, iterations, with compute."""

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.run_factor = self.rng.lognormal(0, self.run_noise)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        return tuple(Endpoint(rank=rank, host=f"h{rank}", machine=f"h{rank}") for rank in range(self.world_size))

    def collective(
        self,
        kind: CollectiveKind,
        num_bytes: int,
        groups: Sequence[Sequence[int]],
        *,
        iterations: int,
        warmup: int,
        dtype: str = "float32",
        with_compute: bool = False,
        check: bool = True,
    ) -> CollectiveTimes:
        self.calls.append((kind, num_bytes, len(groups), iterations, with_compute))
        rows = []
        for group in groups:
            slowness = self.slow.get(tuple(group), 1.0) * (self.together_slowness if len(groups) > 1 else 1.0)
            slowness *= self.compute_slowness if with_compute else 1.0
            on_link = bus_factor(kind, len(group)) * num_bytes * self.beta_s_per_byte * slowness
            once = self.run_factor * (message_steps(kind, len(group)) * self.alpha_s + on_link)
            of_iterations = once * self.rng.lognormal(0, self.noise, iterations)
            rows += [of_iterations] * len(group)
        return CollectiveTimes(
            ranks=tuple(rank for group in groups for rank in group),
            seconds=np.array(rows),
            correct=kind != self.wrong,
        )


def swept(
    fabric: FakeCollectives,
    *groups: GroupSet,
    taken_at: datetime = NOON,
    kinds: tuple[CollectiveKind, ...] = COLLECTIVE_KINDS,
) -> SweepResult:
    """A small sweep on the world, or on other groups."""
    plan = SweepPlan(
        groups=groups or (world_group(fabric.world_size),), sizes=SIZES, kinds=kinds, iterations=10, passes=1
    )
    return sweep(fabric, plan, taken_at=taken_at)
