"""Batches for one data-parallel rank: endless in the sample order for training, once in stream order for validation.

Shapes: B rows of this rank, S = seq_len tokens.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset import IGNORED_LABEL, PackedDataset, Sample
from data_pipeline.errors import DataError
from data_pipeline.order import samples_at


@dataclass(frozen=True, kw_only=True)
class Batch:
    """tokens_BS and labels_BS int64 [B, S], document_ids_BS int32 [B, S]; see Sample."""

    tokens_BS: NDArray[np.int64]
    labels_BS: NDArray[np.int64]
    document_ids_BS: NDArray[np.int32]


def global_batch_indices(
    start_position: int, global_batch_size: int, *, seed: int, num_samples: int, manifest_hash: str
) -> NDArray[np.int64]:
    """The samples [global_batch_size] of the global batch that starts at a position, the same on every rank."""
    positions = np.arange(start_position, start_position + global_batch_size)
    return samples_at(positions, seed=seed, num_samples=num_samples, manifest_hash=manifest_hash)


class BatchLoader:
    """This rank's share of every global batch, without end: rows [r * G / R, (r + 1) * G / R) for rank r of R.

    `position`, the global samples handed out so far, is the whole state: a loader opened with it as `start_position`
    continues where this one stands, on any number of ranks. A thread reads ahead; what goes wrong there is raised by
    the `next` that would have returned that batch. Close it, or use it in a `with`.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        seed: int,
        global_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_position: int = 0,
        read_ahead: int = 4,
    ) -> None:
        """Raises DataError when the ranks cannot share the global batch equally."""
        if global_batch_size % dp_size:
            raise DataError(
                f"a global batch of {global_batch_size} samples does not divide among {dp_size} data-parallel ranks: "
                f"set train.global_batch_size to a multiple of {dp_size}"
            )
        assert 0 <= dp_rank < dp_size, f"rank {dp_rank} of {dp_size}"
        assert read_ahead >= 1, "at least one batch is read ahead"
        self._dataset, self._seed, self._global_batch_size = dataset, seed, global_batch_size
        share = global_batch_size // dp_size
        self._share = slice(dp_rank * share, (dp_rank + 1) * share)
        self._position = start_position
        self._next_to_read = start_position
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch-reader")
        self._pending: deque[Future[Batch]] = deque()
        for _ in range(read_ahead):
            self._read_one_more()

    @property
    def position(self) -> int:
        """Global samples consumed: the start of the next batch."""
        return self._position

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._pending:
            raise StopIteration  # Closed.
        batch = self._pending[0].result()
        self._pending.popleft()
        self._position += self._global_batch_size
        self._read_one_more()
        return batch

    def close(self) -> None:
        """Ends the thread. May be called twice."""
        self._pending.clear()
        self._reader.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_one_more(self) -> None:
        self._pending.append(self._reader.submit(self._read, self._next_to_read))
        self._next_to_read += self._global_batch_size

    def _read(self, position: int) -> Batch:
        indices = global_batch_indices(
            position,
            self._global_batch_size,
            seed=self._seed,
            num_samples=len(self._dataset),
            manifest_hash=self._dataset.prepared.manifest_hash,
        )
        return _stack([self._dataset[index] for index in indices[self._share].tolist()])


class ValidationBatches:
    """`max_samples` rows spread evenly over a data set (all when None), each once, in order, dealt out to the ranks.

    Every rank gets the same number of batches of the same size; where rows run out, rows without a single label take
    their place. So the loss over all ranks, a sum over labels, does not depend on the number of ranks.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        max_samples: int | None = None,
    ) -> None:
        assert 0 <= dp_rank < dp_size, f"rank {dp_rank} of {dp_size}"
        self._dataset, self._batch_size, self._dp_rank, self._dp_size = dataset, batch_size, dp_rank, dp_size
        self._num_samples = len(dataset) if max_samples is None else min(max_samples, len(dataset))

    def __len__(self) -> int:
        return -(-self._num_samples // (self._batch_size * self._dp_size))

    def __iter__(self) -> Iterator[Batch]:
        for step in range(len(self)):
            start = (step * self._dp_size + self._dp_rank) * self._batch_size
            yield _stack([self._row(index) for index in range(start, start + self._batch_size)])

    def _row(self, index: int) -> Sample:
        if index < self._num_samples:
            return self._dataset[index * len(self._dataset) // self._num_samples]
        row = self._dataset[0]
        return Sample(
            tokens_S=row.tokens_S,
            labels_S=np.full_like(row.labels_S, IGNORED_LABEL),
            document_ids_S=row.document_ids_S,
        )


def _stack(samples: list[Sample]) -> Batch:
    return Batch(
        tokens_BS=np.stack([sample.tokens_S for sample in samples]),
        labels_BS=np.stack([sample.labels_S for sample in samples]),
        document_ids_BS=np.stack([sample.document_ids_S for sample in samples]),
    )
