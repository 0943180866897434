"""A split as rows of equal length.

Shapes: S = seq_len tokens.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.manifest import Split
from data_pipeline.prepared import PreparedData

IGNORED_LABEL = -100
"""The label where there is none: such a position counts neither in the loss nor in its denominator."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row: tokens_S and labels_S int64 [seq_len], document_ids_S int32 [seq_len], 0 for the row's first document.

    labels_S[i] is the token after tokens_S[i]. The last token of a document has the separator as its label: that is how
    the model learns to stop.
    """

    tokens_S: NDArray[np.int64]
    labels_S: NDArray[np.int64]
    document_ids_S: NDArray[np.int32]


class PackedDataset:
    """Row i of a split: tokens [i * seq_len, (i + 1) * seq_len) of its stream, and the labels one token further.

    `train` drops the last tokens where they fill no row; `held_out` keeps them, padded with separators whose label is
    IGNORED_LABEL, so that every held-out token but the very first is predicted exactly once.
    """

    def __init__(self, prepared: PreparedData, split: Split, seq_len: int) -> None:
        """Raises DataError when the split does not fill a single row."""
        self.prepared, self.split, self.seq_len = prepared, split, seq_len
        self._separator = prepared.manifest.eot_id
        self._stream = prepared.stream(split)
        self._num_labels = max(0, len(self._stream) - 1)
        self._num_samples = self._num_labels // seq_len if split == "train" else -(-self._num_labels // seq_len)
        if not self._num_samples and split == "train":
            raise DataError(
                f"{prepared.directory}: {len(self._stream)} training tokens fill no row of {seq_len} + 1: lower "
                "data.seq_len, or add text"
            )
        if not self._num_samples:
            raise DataError(
                f"{prepared.directory}: nothing is held out: raise data.held_out_fraction, or turn validation off"
            )

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        """Raises IndexError beyond the end, DataError for a token id beyond the vocabulary."""
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        start = index * self.seq_len
        num_labels = min(self.seq_len, self._num_labels - start)
        row_S = self._stream.read(start, start + num_labels + 1)
        tokens_S = np.full(self.seq_len, self._separator, np.int64)
        labels_S = np.full(self.seq_len, IGNORED_LABEL, np.int64)
        tokens_S[:num_labels] = row_S[:-1]
        labels_S[:num_labels] = row_S[1:]
        document_ids_S = np.cumsum(tokens_S == self._separator, dtype=np.int32)
        return Sample(tokens_S=tokens_S, labels_S=labels_S, document_ids_S=document_ids_S - document_ids_S[0])
