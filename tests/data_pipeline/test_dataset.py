import numpy as np
import pytest

from data_pipeline.dataset import IGNORED_LABEL, PackedDataset
from data_pipeline.errors import DataError
from data_pipeline.manifest import Split
from data_pipeline.prepared import PreparedData


def _stream(prepared: PreparedData, split: Split) -> np.ndarray:
    stream = prepared.stream(split)
    return stream.read(0, len(stream))


@pytest.mark.parametrize("seq_len", [1, 7, 16, 250])
def test_train_rows_are_the_stream_in_order(small_data: PreparedData, seq_len: int) -> None:
    dataset, stream = PackedDataset(small_data, "train", seq_len), _stream(small_data, "train")
    num_labels = len(dataset) * seq_len
    assert stream.size - 1 - num_labels in range(seq_len)
    rows = [dataset[index] for index in range(len(dataset))]
    assert np.array_equal(np.concatenate([row.tokens_S for row in rows]), stream[:num_labels])
    assert np.array_equal(np.concatenate([row.labels_S for row in rows]), stream[1 : num_labels + 1])
    assert {row.tokens_S.dtype for row in rows} == {row.labels_S.dtype for row in rows} == {np.dtype(np.int64)}


@pytest.mark.parametrize("seq_len", [1, 7, 16, 10_000])
def test_held_out_predicts_every_token_once(small_data: PreparedData, seq_len: int) -> None:
    dataset, stream = PackedDataset(small_data, "held_out", seq_len), _stream(small_data, "held_out")
    labels = np.concatenate([dataset[index].labels_S for index in range(len(dataset))])
    assert np.array_equal(labels[labels != IGNORED_LABEL], stream[1:])
    assert labels.size - (stream.size - 1) in range(seq_len)
    # All text is behind a label, so bits per byte may divide by the bytes of the labels.
    held_out = small_data.manifest.splits["held_out"]
    assert small_data.token_bytes[labels[labels != IGNORED_LABEL]].sum() == held_out.num_bytes


def test_document_ids_change_where_a_document_starts(small_data: PreparedData) -> None:
    dataset = PackedDataset(small_data, "train", 60)
    seen = 0
    for index in range(len(dataset)):
        row = dataset[index]
        assert row.document_ids_S.dtype == np.int32
        assert row.document_ids_S[0] == 0
        starts = row.tokens_S[1:] == small_data.manifest.eot_id
        assert np.array_equal(np.diff(row.document_ids_S), starts)
        seen += int(starts.sum())
    assert seen > 0


def test_padding_is_in_no_real_document(small_data: PreparedData) -> None:
    row = PackedDataset(small_data, "held_out", 10_000)[0]
    padding = row.labels_S == IGNORED_LABEL
    assert padding.any()
    assert not set(row.document_ids_S[padding]) & set(row.document_ids_S[~padding])


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_end_is_an_index_error(small_data: PreparedData, split: Split) -> None:
    dataset = PackedDataset(small_data, split, 16)
    for index in (len(dataset), -1):
        with pytest.raises(IndexError, match="sample"):
            dataset[index]


def test_too_little_text_says_so(small_data: PreparedData) -> None:
    with pytest.raises(DataError, match=r"training tokens fill no row of 100000 \+ 1: lower data\.seq_len"):
        PackedDataset(small_data, "train", 100_000)
