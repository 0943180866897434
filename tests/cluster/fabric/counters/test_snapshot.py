from collections.abc import Mapping

import pytest

from cluster.fabric.counters import Count, Snapshot, growth


def _snapshot(states: Mapping[str, float] | None = None, **counts: Count) -> Snapshot:
    return Snapshot(counts=counts, states=states or {})


@pytest.mark.parametrize(
    ("before", "after", "steps"),
    [
        (5, 12, 7),
        (0, 0, 0),
        (2**32 - 10, 5, 15),  # wrapped at 32 bits
        (2**40, 2**40 + 1, 1),
        (1000, 3, 3),  # cleared meanwhile, far from any wrap
        (2**33, 4, 4),  # too large for 32 bits, so it was cleared
    ],
)
def test_growth_minds_wraps_and_resets(before: int, after: int, steps: int) -> None:
    assert growth(_snapshot(a=Count(value=before)), _snapshot(a=Count(value=after))) == {"a": steps}


def test_growth_is_in_the_unit_of_the_name() -> None:
    # Data of a port is counted in words of four bytes, and wraps as words do.
    before = _snapshot(x_bytes=Count(value=2**32 - 1, unit=4.0), y_s=Count(value=10, unit=1e-6))
    after = _snapshot(x_bytes=Count(value=1, unit=4.0), y_s=Count(value=1_500_010, unit=1e-6))
    assert growth(before, after) == pytest.approx({"x_bytes": 8.0, "y_s": 1.5})


def test_what_was_not_counted_before_has_no_growth() -> None:
    assert growth(_snapshot(gone=Count(value=1)), _snapshot(new=Count(value=7))) == {}


def test_states_hold_where_either_moment_had_them() -> None:
    before = _snapshot({"down": 1.0, "hot": 0.0, "rate": 5.0, "capped": 0.0})
    after = _snapshot({"down": 0.0, "hot": 1.0, "rate": 7.0, "capped": 0.0})
    assert growth(before, after) == {"down": 1.0, "hot": 1.0, "rate": 7.0, "capped": 0.0}
