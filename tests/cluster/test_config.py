"""The `[fabric]` section."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from cluster.config import FabricConfig


@pytest.mark.parametrize(
    ("monitor", "num_ranks", "watches"),
    [("auto", 1, False), ("auto", 2, True), ("on", 1, True), ("off", 8, False)],
)
def test_who_is_watched(monitor: str, num_ranks: int, watches: bool) -> None:
    assert FabricConfig(monitor=monitor).watches(num_ranks) is watches


@pytest.mark.parametrize(
    "bad", [{"monitor": "yes"}, {"hang_seconds": 0}, {"window_steps": 1}, {"prometheus_port": 70000}, {"port": 1}]
)
def test_what_makes_no_sense_is_refused(bad: dict) -> None:
    with pytest.raises(ValidationError):
        FabricConfig(**bad)
