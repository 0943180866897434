import numpy as np
import pytest

from data_pipeline.order import sample_at, samples_at


def _epoch(epoch: int, num_samples: int, *, seed: int = 1, manifest_hash: str = "m") -> np.ndarray:
    positions = np.arange(epoch * num_samples, (epoch + 1) * num_samples)
    return samples_at(positions, seed=seed, num_samples=num_samples, manifest_hash=manifest_hash)


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_every_epoch_is_a_permutation(num_samples: int) -> None:
    for epoch in (0, 1, 7):
        assert np.array_equal(np.sort(_epoch(epoch, num_samples)), np.arange(num_samples))


def test_seed_epoch_and_manifest_each_change_the_order() -> None:
    orders = [
        _epoch(0, 500),
        _epoch(1, 500),
        _epoch(0, 500, seed=2),
        _epoch(0, 500, manifest_hash="n"),
    ]
    for i, first in enumerate(orders):
        for second in orders[i + 1 :]:
            assert np.count_nonzero(first == second) < 10  # One is expected by chance.


def test_the_order_never_changes_between_versions() -> None:
    """A run that resumes after an update must go on with the samples that it would have had."""
    assert _epoch(0, 10, seed=1234).tolist() == [0, 6, 7, 8, 5, 4, 2, 1, 9, 3]
    assert _epoch(1, 10, seed=1234).tolist() == [7, 5, 6, 8, 9, 0, 4, 3, 2, 1]


def test_scalar_and_vector_agree_across_epochs() -> None:
    positions = np.array([0, 5, 99, 100, 101, 250])
    vector = samples_at(positions, seed=3, num_samples=100, manifest_hash="m")
    scalars = [sample_at(int(p), seed=3, num_samples=100, manifest_hash="m") for p in positions]
    assert vector.tolist() == scalars


def test_is_mixed_well() -> None:
    """Neighbours end far apart, and every part of the data comes evenly in every part of the epoch."""
    order = _epoch(0, 10_000)
    counts, _, _ = np.histogram2d(np.arange(10_000), order, bins=10)
    # 100 cells of 100 expected: chi-square has 81 degrees of freedom, and beyond 140 a chance of 0.00005.
    assert ((counts - 100) ** 2 / 100).sum() < 140
    assert np.abs(np.diff(order)).mean() == pytest.approx(10_000 / 3, rel=0.05)


def test_huge_data_needs_no_table() -> None:
    assert 0 <= sample_at(10**15, seed=1, num_samples=10**14, manifest_hash="m") < 10**14
