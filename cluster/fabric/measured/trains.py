"""Trains of chunks: how a transfer is cut, and what rate the arrival of its chunks says. Imports without torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.fabric.measured.transport import Train

_MOST_CHUNKS = 16
_LEAST_CHUNK_BYTES = 16 << 10
"""Below it a chunk's own overhead shows in its rate."""
_LEAST_SEEN_SHARE = 0.3
_CLOCK_S = 1e-9


def plan_train(num_bytes: int) -> Train:
    """A train that times `num_bytes`, and sends an eighth of it before, which empties token buckets and opens windows.

    Raises ValueError where there is nothing to send.
    """
    if num_bytes < 1:
        raise ValueError(f"a transfer has at least one byte, not {num_bytes}")
    num_chunks = min(max(num_bytes // _LEAST_CHUNK_BYTES, 2), _MOST_CHUNKS)
    return Train(chunk_bytes=-(-num_bytes // num_chunks), num_chunks=num_chunks, num_warmup=-(-num_chunks // 8))


def rate_of(stamps: Sequence[float], train: Train) -> float:
    """Bytes a second of a train, from its receiver's clock alone.

    `stamps`: when the receiver was ready, when the last warm-up chunk had come, and when each chunk after it had.

    The inverse slope of time over bytes by least squares, from the last warm-up chunk on: so neither the clocks of two
    ranks nor who started first matter; and one stamp that comes late, since its process had to wait for a core, weighs
    less than in bytes / (last - first). Where the chunks came so fast that most of the time went by before the first
    stamp, the stamps tell how fast they were read, not how fast they came: then all bytes over all the time, which is
    too slow rather than too fast.
    """
    begin, *arrivals = stamps
    if len(arrivals) != train.num_chunks + 1:
        raise ValueError(f"{len(arrivals)} arrivals of a train of {train.num_chunks} chunks")
    whole = arrivals[-1] - begin
    if arrivals[-1] - arrivals[0] < _LEAST_SEEN_SHARE * whole:
        return train.chunk_bytes * (train.num_warmup + train.num_chunks) / whole
    times = np.asarray(arrivals, dtype=np.float64)
    bytes_ = train.chunk_bytes * np.arange(len(times), dtype=np.float64)
    centred = bytes_ - bytes_.mean()
    seconds_a_byte = float(centred @ (times - times[0])) / float(centred @ centred)
    return 1.0 / max(seconds_a_byte, _CLOCK_S / bytes_[-1])
