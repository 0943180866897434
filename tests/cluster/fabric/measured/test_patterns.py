"""The data that check a collective, against what the collective's definition makes of them."""

import numpy as np
import pytest

from cluster.fabric.measured.patterns import element_counts, expected_values, given_values
from cluster.fabric.measured.transport import COLLECTIVE_KINDS, CollectiveKind


def _by_definition(kind: CollectiveKind, given: list[np.ndarray], index: int) -> np.ndarray:
    size = len(given)
    if kind == "all_reduce":
        return np.sum(given, axis=0)
    if kind == "all_gather":
        return np.concatenate(given)
    if kind == "reduce_scatter":
        return np.split(np.sum(given, axis=0), size)[index]
    if kind == "all_to_all":
        return np.concatenate([np.split(one, size)[index] for one in given])
    return given[0 if kind == "broadcast" else (index - 1) % size]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("kind", COLLECTIVE_KINDS)
def test_what_is_expected_is_what_the_collective_means(kind: CollectiveKind, size: int) -> None:
    given_count, taken_count = element_counts(kind, 1000, size)
    given = [given_values(kind, index, size, given_count) for index in range(size)]
    for index in range(size):
        expected = expected_values(kind, index, size, taken_count)
        np.testing.assert_array_equal(expected, _by_definition(kind, given, index))
        assert expected.max() <= 255  # exact in every dtype, bfloat16 and uint8 too
    if size > 1:  # a rank that keeps its own data, or has another's, is not taken for right
        assert not np.array_equal(given[-1][:5], expected_values(kind, size - 1, size, taken_count)[:5]) or kind in (
            "all_gather",
            "all_to_all",
        )


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        ("all_reduce", (1003, 1003)),
        ("all_gather", (250, 1000)),
        ("reduce_scatter", (1000, 250)),
        ("all_to_all", (1000, 1000)),
        ("broadcast", (1003, 1003)),
        ("send_recv", (1003, 1003)),
    ],
)
def test_sizes_are_those_of_nccl_tests(kind: CollectiveKind, counts: tuple[int, int]) -> None:
    assert element_counts(kind, 1003, 4) == counts
