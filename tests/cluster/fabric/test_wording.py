"""Figures as sentences say them."""

from __future__ import annotations

import pytest

from cluster.fabric.wording import duration, durations, rates


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (12.34, "12.3 s"),
        (3.1e-3, "3.10 ms"),
        (0.4567, "457 ms"),
        (8.2e-6, "8.20 us"),
        (0.0, "0.00 us"),
        (4e-8, "0.04 us"),
    ],
)
def test_a_duration_has_three_digits_and_a_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_figures_that_are_compared_share_a_unit() -> None:
    assert durations([0.0004, 0.012]) == (("0.40", "12.0"), "ms")
    assert rates([41.23e9, 33.8e9]) == (("41.2", "33.8"), "GB/s")
    assert rates([5.25e6, 999e3]) == (("5.25", "1.00"), "MB/s")
