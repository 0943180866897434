"""Slow compute among many, on a fabric that answers as it is told."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from cluster.fabric.probing import Figures
from cluster.fabric.settings import DiagnosisSettings
from cluster.fabric.simulation.fabric import Noise, SimulatedFabric
from cluster.fabric.simulation.topology import fat_tree
from cluster.fabric.stages.session import Session
from cluster.fabric.wide.computing import slow_computing

NOISE = Noise(rate=0, unfairness=0, compute=0.01, round_trip=0, outliers=0, drift=0, unequal=0)
CULPRIT = 7


class Told(SimulatedFabric):
    """A healthy fabric but for one endpoint, whose passes take so many times longer."""

    def __init__(self, times: Sequence[float]) -> None:
        super().__init__(fat_tree(128), [], noise=NOISE, seed=0)
        self._times = list(times)

    def compute(self, who: Sequence[int], *, work_s: float) -> Figures:
        seconds = super().compute(who, work_s=work_s)
        seconds[np.asarray(who) == CULPRIT] = work_s * self._times[self.calls - 1]
        return seconds


def _slow(*times: float) -> list[int | None]:
    session = Session(Told(times), DiagnosisSettings())
    session.rounds = 8
    return [item.endpoint for item in slow_computing(session)]


@pytest.mark.parametrize("times", [(1.12, 1.13, 1.11, 1.12), (1.7, 1.68, 1.72, 1.71), (1.5, 1.52, 2.9, 1.49)])
def test_slow_in_every_pass_is_slow_compute(times: tuple[float, ...]) -> None:
    assert _slow(*times) == [CULPRIT]


@pytest.mark.parametrize("times", [(1.05, 1.3, 1.5, 1.9), (1.9, 1.04, 1.4, 1.7), (1.04, 1.05, 1.8, 1.8)])
def test_a_few_accidents_in_a_row_are_not(times: tuple[float, ...]) -> None:
    assert _slow(*times) == []


def test_one_quick_pass_ends_it() -> None:
    session = Session(Told([1.9, 1.0, 1.9, 1.9]), DiagnosisSettings())
    assert slow_computing(session) == []
    assert session.rounds == 2
