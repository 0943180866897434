"""Activations in the host's memory between forward and backward (as in vDNN, Rhu et al. 2016).

On CUDA copies run on a stream of their own, into pinned memory, and come back one block before they are needed: the device
holds what two blocks have saved. On a CPU they are copies like any other: nothing is saved, and everything can be tested.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

_SMALLEST_BYTES = 64 * 2**10


class ActivationOffload:
    """Moves what blocks save for their backward. One store serves all blocks of a decoder."""

    def __init__(self, *, smallest_bytes: int = _SMALLEST_BYTES) -> None:
        self.smallest_bytes = smallest_bytes
        """Tensors below this stay: a copy costs more than it frees."""
        self.moved_bytes = 0
        """Bytes moved to the host since the store was made."""
        self.on_moved: Callable[[Tensor], None] = _nothing
        """Called with each copy on the host."""
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._newest: weakref.ref[_BlockRecord] | None = None

    def wrap(self, block: nn.Module, layer: int) -> None:
        """Lets `block.forward` keep what it saves in the host's memory. `layer`: its place in the whole model."""
        forward = block.forward

        def offloaded(*args: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args)
            record = self._new_record(layer, block)
            with torch.autograd.graph.saved_tensors_hooks(record.pack, record.unpack):
                return forward(*args)

        block.forward = offloaded
        object.__setattr__(block, "offload", self)  # not a part of the module

    def settle(self) -> None:
        """Lets go of all that is being copied, as if the copies were done; what follows on the device waits for them."""
        newest = None if self._newest is None else self._newest()
        while newest is not None:
            newest.release_origins()
            newest = newest.previous

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream on which this store copies."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _new_record(self, layer: int, block: nn.Module) -> _BlockRecord:
        newest = None if self._newest is None else self._newest()
        if newest is not None and newest.previous is not None:
            # The copies of two blocks ago: waiting for younger ones would hold the device up.
            newest.previous.release_origins()
        # Weights are saved too, as the factors that they are. Under FSDP2 these are the gathered ones of this moment.
        weights = {StorageWeakRef(p.untyped_storage()).cdata for p in [*block.parameters(), *block.buffers()]}
        record = _BlockRecord(store=self, weights=weights, previous=newest, layer=layer)
        if newest is not None and newest.layer >= layer:  # another micro batch begins
            newest.release_origins()
            record.previous = None
        self._newest = weakref.ref(record)
        return record


@dataclass(eq=False)
class _HostCopy:
    """One storage's contents on the host; `on_device` again from shortly before the backward to the last use in it."""

    origin: StorageWeakRef
    version: int
    host: Tensor
    device: torch.device
    num_uses: int = 0
    on_device: Tensor | None = None


@dataclass(frozen=True)
class _Packed:
    """A saved tensor as a view of a storage on the host."""

    copy: _HostCopy
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


@dataclass(eq=False)
class _BlockRecord:
    """What one call of one block has saved. Lives as long as the graph that the call made."""

    store: ActivationOffload
    layer: int
    weights: set[int]
    previous: _BlockRecord | None
    copies: dict[int, _HostCopy] = field(default_factory=dict)
    origins: list[Tensor] = field(default_factory=list)
    """On CUDA: what is being copied. Held, and let go after a wait, rather than left to `record_stream`, which would
    return the memory at a moment that depends on how far the device has come."""
    copied: torch.cuda.Event | None = None
    fetched: torch.cuda.Event | None = None
    has_fetched: bool = False
    has_begun_backward: bool = False

    def pack(self, tensor: Tensor) -> Tensor | _Packed:
        """To the host, unless it is a weight or small. Tensors that share memory are moved once."""
        storage = tensor.untyped_storage()
        origin = StorageWeakRef(storage)
        if type(tensor) is not Tensor or origin.cdata in self.weights or storage.nbytes() < self.store.smallest_bytes:
            return tensor
        copy = self.copies.get(origin.cdata)
        if copy is None or copy.origin.expired() or copy.version != tensor._version:
            copy = _HostCopy(origin, tensor._version, self._to_host(storage, tensor.device), tensor.device)
            self.copies[origin.cdata] = copy
        copy.num_uses += 1
        return _Packed(copy, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(self, packed: Tensor | _Packed) -> Tensor:
        """Back on its device; the first call in a backward also sends for what the block before has saved."""
        if not self.has_begun_backward:
            self._begin_backward()
        if isinstance(packed, Tensor):
            return packed
        copy = packed.copy
        whole = copy.on_device
        if whole is None:  # a second backward through the same graph
            whole = copy.host.to(copy.device, copy=True)
        copy.num_uses -= 1
        if copy.num_uses <= 0:
            copy.on_device = None
        view = torch.empty(0, dtype=packed.dtype, device=whole.device)
        return view.set_(whole.untyped_storage(), packed.offset, packed.shape, packed.stride)

    def fetch(self) -> None:
        """Starts to bring everything back."""
        if self.has_fetched:
            return
        self.has_fetched = True
        for copy in self.copies.values():
            if copy.device.type != "cuda":
                copy.on_device = copy.host.clone()
                continue
            stream = self.store.stream(copy.device)
            copy.on_device = torch.empty_like(copy.host, device=copy.device)
            stream.wait_stream(torch.cuda.current_stream(copy.device))  # the memory may still be in use by others there
            with torch.cuda.stream(stream):
                copy.on_device.copy_(copy.host, non_blocking=True)
                self.fetched = stream.record_event(self.fetched)

    def release_origins(self) -> None:
        """Lets go what has been copied; the device waits for the copies, the host does not."""
        if self.copied is not None and self.origins:
            torch.cuda.current_stream(self.origins[0].device).wait_event(self.copied)
        self.origins.clear()

    def _begin_backward(self) -> None:
        self.has_begun_backward = True
        self.release_origins()
        self.fetch()
        if self.fetched is not None:
            # For all of it at once: what the backward turns out not to need is safe to be freed then, too.
            torch.cuda.current_stream().wait_event(self.fetched)
        if self.previous is not None:
            self.previous.release_origins()
            self.previous.fetch()
            self.previous = None

    def _to_host(self, storage: torch.UntypedStorage, device: torch.device) -> Tensor:
        whole = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
        self.store.moved_bytes += storage.nbytes()
        if device.type != "cuda":
            host = whole.clone()
            self.store.on_moved(host)
            return host
        stream = self.store.stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        host = torch.empty(whole.shape, dtype=torch.uint8, pin_memory=True)
        with torch.cuda.stream(stream):
            host.copy_(whole, non_blocking=True)
            self.copied = stream.record_event(self.copied)
        self.origins.append(whole)
        self.store.on_moved(host)
        return host


def _nothing(copy: Tensor) -> None:
    """Nobody wants to know."""
