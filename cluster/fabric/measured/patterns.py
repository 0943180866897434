"""Data by which a collective is checked: every element tells its origin. Sizes as nccl-tests counts them. Without torch.

All values and sums are small whole numbers, exact in every dtype that is measured.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cluster.fabric.measured.transport import CollectiveKind

_ADDERS = 16
"""So many ranks add to every element, beside the one whose own element it is: sums stay small in any world."""


def element_counts(kind: CollectiveKind, count: int, size: int) -> tuple[int, int]:
    """Elements that one rank of `size` gives and takes where nccl-tests calls the whole `count` elements.

    Rounded down to whole blocks where each rank has one, to one element each at least.
    """
    block = max(count // size, 1)
    if kind == "all_gather":
        return block, block * size
    if kind == "reduce_scatter":
        return block * size, block
    if kind == "all_to_all":
        return block * size, block * size
    return max(count, 1), max(count, 1)


def given_values(kind: CollectiveKind, index: int, size: int, count: int) -> NDArray[np.int64]:
    """(count,) what the rank at `index` of a group of `size` gives."""
    places = np.arange(count)
    if kind in ("all_reduce", "reduce_scatter"):
        own = np.where(places % size == index, 1 + places % 5, 0)
        return own + (index < _ADDERS)
    if kind == "all_to_all":
        block = count // size
        return _marked(index, places // block, places % block)
    return _marked(index, np.zeros_like(places), places)


def expected_values(kind: CollectiveKind, index: int, size: int, count: int) -> NDArray[np.int64]:
    """(count,) what the rank at `index` must have after it."""
    places = np.arange(count)
    if kind == "all_reduce":
        return 1 + places % 5 + min(size, _ADDERS)
    if kind == "reduce_scatter":
        return 1 + (places + index * count) % 5 + min(size, _ADDERS)
    if kind == "all_gather":
        block = count // size
        return _marked(places // block, np.zeros_like(places), places % block)
    if kind == "all_to_all":
        block = count // size
        return _marked(places // block, np.full_like(places, index), places % block)
    origin = 0 if kind == "broadcast" else (index - 1) % size
    return _marked(origin, np.zeros_like(places), places)


def _marked(origin: int | NDArray[np.int64], target: NDArray[np.int64], place: NDArray[np.int64]) -> NDArray[np.int64]:
    """A value below 113, a prime, by who sent it, to whom, and where in the message it stands."""
    return (1 + 7 * np.asarray(origin) + 31 * target + 3 * place) % 113
