"""Counts the bytes of live tensors, now and at the highest: on a CPU, on fake tensors, on meta.

An allocator knows this on CUDA only. torch has a tracker too, a private one (`torch.distributed._tools.mem_tracker`), which
sorts by module through hooks and patches of FSDP2's inner parts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

# Sorting all bytes by kind walks over the parameters: not at every new byte of a peak.
_WORTH_SORTING = 1.002

Kinds = Mapping[str, Iterable[Tensor | None]]
OTHER = "activations"


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes of live tensors; `by_kind` adds up to the total, to 0.2% of it where it is a peak's."""

    total: int
    by_kind: dict[str, int] = field(default_factory=dict)


class MemoryTracker(TorchDispatchMode):
    """While it is entered, sees each tensor that an operator of this thread makes, and its end: `with MemoryTracker() as
    tracker`. A storage counts once, however many tensors view it.

    Not seen: what lies outside torch, work space inside an operator, and tensors inside a compiled region. `kinds` names
    tensors that are not activations, as {"parameters": ..., "gradients": ...}; it is asked anew at each new peak.
    """

    def __init__(self, kinds: Callable[[], Kinds] | None = None) -> None:
        super().__init__()
        self._kinds = kinds
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._left_out: set[int] = set()
        self._current = 0
        self._peak = 0
        self._sorted_peak = 0
        self._peak_by_kind: dict[str, int] = {}
        self._resize = torch.UntypedStorage.resize_

    def adopt(self, tensors: Iterable[Tensor | None]) -> None:
        """Counts tensors that were made before."""
        for storage in _storages(tensors):
            self._count(storage)

    def leave_out(self, tensor: Tensor) -> None:
        """From here on does not count a tensor's memory: it stands for memory elsewhere."""
        for storage in _storages([tensor]):
            known = self._live.get(id(storage))
            if known is not None:
                self._current -= known[1]
                self._live[id(storage)] = (known[0], 0)
                self._left_out.add(id(storage))

    def reset_peak(self) -> None:
        """From here on the peak is that of what follows."""
        self._peak = self._sorted_peak = 0
        self._note_peak()

    @property
    def current(self) -> MemoryUse:
        """Bytes that live now."""
        return MemoryUse(total=self._current, by_kind=self._sort())

    @property
    def peak(self) -> MemoryUse:
        """Most bytes that lived at once since the start, or since `reset_peak`."""
        return MemoryUse(total=self._peak, by_kind=dict(self._peak_by_kind))

    def __enter__(self) -> Self:
        resize = self._resize

        def counted_resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._count(storage)
            return result

        # FSDP2 frees what it has gathered by making its storage empty, which is no operator.
        torch.UntypedStorage.resize_ = counted_resize  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*details)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in _storages(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            self._count(storage)
        self._note_peak()
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        known = self._live.get(key)
        if known is None:
            self._live[key] = (weakref.ref(storage, lambda _: self._forget(key)), size)
            self._current += size
        elif known[1] != size and key not in self._left_out:
            self._live[key] = (known[0], size)
            self._current += size - known[1]

    def _forget(self, key: int) -> None:
        self._current -= self._live.pop(key)[1]
        self._left_out.discard(key)

    def _note_peak(self) -> None:
        if self._current <= self._peak:
            return
        self._peak = self._current
        if self._current > self._sorted_peak * _WORTH_SORTING:
            self._sorted_peak = self._current
            self._peak_by_kind = self._sort()

    def _sort(self) -> dict[str, int]:
        found: dict[str, int] = {}
        seen: set[int] = set()
        for kind, tensors in (self._kinds() if self._kinds else {}).items():
            found[kind] = 0
            for storage in _storages(tensors):
                if id(storage) in self._live and id(storage) not in seen:
                    seen.add(id(storage))
                    found[kind] += self._live[id(storage)][1]
        return {**found, OTHER: self._current - sum(found.values())}


def _storages(tensors: Iterable[Tensor | None]) -> Iterator[torch.UntypedStorage]:
    for tensor in tensors:
        if tensor is None:
            continue
        if is_traceable_wrapper_subclass(tensor):  # a DTensor, say: memory is in what it wraps
            names, _ = tensor.__tensor_flatten__()
            parts = (getattr(tensor, name) for name in names)
            yield from _storages(part for part in parts if isinstance(part, Tensor))
        else:
            yield tensor.untyped_storage()
