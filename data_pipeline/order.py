"""Which sample comes when: a pure function of (seed, manifest, position), with no state and no table.

Positions count samples over the whole run. An epoch is one pass over the data; each epoch is its own permutation, so a
run resumes from the position alone, on any number of ranks. The permutation is a balanced Feistel network over the
smallest domain of 4^k >= num_samples, walked until it lands inside (Black and Rogaway 2002, "Ciphers with arbitrary
finite domains", section 3): O(1) time and memory for data of any size.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_NUM_ROUNDS = 8


def sample_at(position: int, *, seed: int, num_samples: int, manifest_hash: str) -> int:
    """The sample (0 <= result < num_samples) at a position (>= 0) of the run."""
    return int(samples_at(np.array([position]), seed=seed, num_samples=num_samples, manifest_hash=manifest_hash)[0])


def samples_at(positions_N: NDArray[np.int64], *, seed: int, num_samples: int, manifest_hash: str) -> NDArray[np.int64]:
    """`sample_at` of many positions [N] at once; they may lie in different epochs."""
    assert num_samples >= 1, "an empty data set has no order"
    assert positions_N.size == 0 or positions_N.min() >= 0, "positions count from 0"
    samples_N = np.empty(positions_N.shape, np.int64)
    epochs_N, offsets_N = np.divmod(positions_N, num_samples)
    for epoch in np.unique(epochs_N):
        in_epoch_N = epochs_N == epoch
        keys = _round_keys(f"{seed}/{epoch}/{manifest_hash}")
        samples_N[in_epoch_N] = _permute(offsets_N[in_epoch_N].astype(np.uint64), num_samples, keys)
    return samples_N


def _round_keys(text: str) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(text.encode(), digest_size=8 * _NUM_ROUNDS).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def _permute(values_N: NDArray[np.uint64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    values_N = _feistel(values_N, half_bits, keys)
    while (outside_N := values_N >= size).any():
        values_N[outside_N] = _feistel(values_N[outside_N], half_bits, keys)
    return values_N


def _feistel(values_N: NDArray[np.uint64], half_bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left_N, right_N = values_N >> shift, values_N & mask
    for key in keys:
        left_N, right_N = right_N, left_N ^ (_mix(right_N ^ key) & mask)
    return (left_N << shift) | right_N


def _mix(x_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))
