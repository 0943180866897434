import threading

import numpy as np
import pytest

from data_pipeline.batches import Batch, BatchLoader, ValidationBatches, global_batch_indices
from data_pipeline.dataset import IGNORED_LABEL, PackedDataset, Sample
from data_pipeline.errors import DataError
from data_pipeline.prepared import PreparedData


@pytest.fixture(scope="module")
def dataset(small_data: PreparedData) -> PackedDataset:
    return PackedDataset(small_data, "train", 16)


def _take(dataset: PackedDataset, count: int, **settings: int) -> list[Batch]:
    with BatchLoader(dataset, seed=5, global_batch_size=12, **settings) as loader:
        return [next(loader) for _ in range(count)]


def _tokens(batches: list[Batch]) -> np.ndarray:
    return np.stack([batch.tokens_BS for batch in batches])


def test_batches_follow_the_order_over_epochs(dataset: PackedDataset) -> None:
    count = 2 * len(dataset) // 12 + 2
    batches = _take(dataset, count)
    order = global_batch_indices(
        0, 12 * count, seed=5, num_samples=len(dataset), manifest_hash=dataset.prepared.manifest_hash
    )
    rows = [dataset[index] for index in order.tolist()]
    for name in ("tokens", "labels", "document_ids"):
        found = np.concatenate([getattr(batch, f"{name}_BS") for batch in batches])
        assert np.array_equal(found, np.stack([getattr(row, f"{name}_S") for row in rows]))
    assert set(order[: len(dataset)].tolist()) == set(range(len(dataset)))


@pytest.mark.parametrize("dp_size", [2, 3, 4, 12])
def test_any_number_of_ranks_sees_the_same_global_batches(dataset: PackedDataset, dp_size: int) -> None:
    shares = [_tokens(_take(dataset, 3, dp_rank=rank, dp_size=dp_size)) for rank in range(dp_size)]
    assert np.array_equal(np.concatenate(shares, axis=1), _tokens(_take(dataset, 3)))


def test_position_is_the_whole_state(dataset: PackedDataset) -> None:
    straight = _tokens(_take(dataset, 20))
    with BatchLoader(dataset, seed=5, global_batch_size=12) as loader:
        assert loader.position == 0
        for _ in range(7):
            next(loader)
        position = loader.position
    assert position == 7 * 12
    resumed = [_tokens(_take(dataset, 13, start_position=position, dp_rank=r, dp_size=2)) for r in range(2)]
    assert np.array_equal(np.concatenate(resumed, axis=1), straight[7:])


@pytest.mark.parametrize("read_ahead", [1, 9])
def test_reading_ahead_changes_nothing(dataset: PackedDataset, read_ahead: int) -> None:
    assert np.array_equal(_tokens(_take(dataset, 5, read_ahead=read_ahead)), _tokens(_take(dataset, 5)))


def test_ranks_that_do_not_divide_the_batch(dataset: PackedDataset) -> None:
    with pytest.raises(DataError, match=r"12 samples does not divide among 5 .*set train\.global_batch_size"):
        BatchLoader(dataset, seed=1, global_batch_size=12, dp_size=5)


def test_errors_of_the_reader_reach_the_consumer_in_turn(
    dataset: PackedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read = PackedDataset.__getitem__

    def fail_in_third_batch(self: PackedDataset, index: int) -> Sample:
        reads.append(index)
        if len(reads) == 2 * 12 + 1:
            raise DataError("shard gone")
        return read(self, index)

    monkeypatch.setattr(PackedDataset, "__getitem__", fail_in_third_batch)
    with BatchLoader(dataset, seed=5, global_batch_size=12) as loader:
        next(loader)
        next(loader)
        for _ in range(2):  # It does not skip the batch that failed.
            with pytest.raises(DataError, match="shard gone"):
                next(loader)
        assert loader.position == 24


def test_close_ends_the_thread_and_the_iteration(dataset: PackedDataset) -> None:
    loader = BatchLoader(dataset, seed=5, global_batch_size=12)
    next(loader)
    loader.close()
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch-reader")]
    assert list(loader) == []


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("max_samples", [None, 1, 5, 10_000])
def test_validation_covers_each_row_once_on_any_number_of_ranks(
    small_data: PreparedData, dp_size: int, max_samples: int | None
) -> None:
    held_out = PackedDataset(small_data, "held_out", 16)
    expected = [held_out[i].labels_S.tolist() for i in range(min(max_samples or len(held_out), len(held_out)))]
    parts = [
        ValidationBatches(held_out, batch_size=4, dp_rank=rank, dp_size=dp_size, max_samples=max_samples)
        for rank in range(dp_size)
    ]
    assert len({len(part) for part in parts}) == 1
    batches = [list(part) for part in parts]
    assert {len(part) for part in batches} == {len(parts[0])}
    in_turn = [batch for step in zip(*batches, strict=True) for batch in step]
    assert {batch.tokens_BS.shape for batch in in_turn} == {(4, 16)}
    rows = [row for batch in in_turn for row in batch.labels_BS.tolist()]
    assert [row for row in rows if set(row) != {IGNORED_LABEL}] == expected


def test_a_part_of_the_held_out_rows_is_spread_over_all_of_them(small_data: PreparedData) -> None:
    dataset = PackedDataset(small_data, "held_out", 4)
    chosen = [batch.tokens_BS[0].tolist() for batch in ValidationBatches(dataset, batch_size=1, max_samples=3)]
    assert len(dataset) > 6
    assert chosen == [dataset[index * len(dataset) // 3].tokens_S.tolist() for index in range(3)]
    assert chosen != [dataset[index].tokens_S.tolist() for index in range(3)]
