"""Between the pieces of a state and torch.distributed.checkpoint's files.

The files know whole tensors and boxes of them, and nothing of the layout that wrote them: whoever asks for a box later
gets it out of whichever boxes were saved.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_load_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from parallel.checkpoint.fit import SavedTensor
from parallel.checkpoint.pieces import Box, FlatState, box_of
from parallel.errors import CheckpointError
from parallel.placement import Piece
from parallel.world import World


def contents(path: Path) -> dict[str, SavedTensor | None]:
    """The name of every entry in a checkpoint, with its shape and type, or None for an object. No collective."""
    return {
        key: SavedTensor(shape=entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for key, entry in dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items()
    }


def write(path: Path, shares: FlatState, staged: Mapping[str, Any], world: World | None, *, num_files: int = 1) -> None:
    """Writes each rank's share (no box twice) into a directory. A collective over the world, unless that is None.

    `shares` has pieces and objects; `staged` has for each of their keys the bytes to write: a plain tensor of the
    piece's shape, or the object. `num_files` is for each rank.
    """
    _quiet()
    group = None if world is None else world.control_group
    dcp.save(
        shares,
        storage_writer=dcp.FileSystemWriter(path, thread_count=num_files, sync_files=True),
        planner=_PieceSavePlanner(staged),
        process_group=group,
        no_dist=group is None,
    )


def read(path: Path, wanted: FlatState, world: World | None) -> FlatState:
    """Fills the pieces of `wanted` in place and returns the objects. A collective over the world, unless that is None.

    Raises `CheckpointError` when the files cannot be read.
    """
    _quiet()
    objects = dict(wanted)
    group = None if world is None else world.control_group
    try:
        dcp.load(
            objects,
            storage_reader=dcp.FileSystemReader(path),
            planner=_PieceLoadPlanner(),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        raise CheckpointError(f"checkpoint {path} cannot be loaded: {root_cause(error)}") from error
    return {key: value for key, value in objects.items() if not isinstance(value, Piece)}


class WholeEntries(Mapping[str, Any]):
    """All entries of a checkpoint, each read from the files when it is asked for, its tensors whole and on the CPU."""

    def __init__(self, path: Path) -> None:
        self._reader = dcp.FileSystemReader(path)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def __getitem__(self, key: str) -> Any:
        saved = self._metadata.state_dict_metadata[key]
        state: FlatState = {key: None}
        if isinstance(saved, TensorStorageMetadata):
            local = torch.empty(saved.size, dtype=saved.properties.dtype)
            state[key] = Piece(local=local, shape=saved.size, offsets=(0,) * len(saved.size))
        planner = _PieceLoadPlanner()
        planner.set_up_planner(state, self._metadata)
        self._reader.read_data(planner.create_local_plan(), planner).wait()
        return state[key].local if isinstance(state[key], Piece) else state[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._metadata.state_dict_metadata)

    def __len__(self) -> int:
        return len(self._metadata.state_dict_metadata)


def root_cause(error: BaseException) -> str:
    """One line. DCP collects the errors of all ranks into one of its own; the first of them says enough."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return f"{type(error).__name__}: {error}"


class _PieceSavePlanner(DefaultSavePlanner):
    """Plans by the live state (its shapes and boxes, which never change) and takes the bytes from its staged copy."""

    def __init__(self, staged: Mapping[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._staged = staged

    def create_local_plan(self) -> SavePlan:
        boxes = {key: box_of(key, value) for key, value in self.state_dict.items()}
        self.plan = SavePlan([_write_item(box, self.state_dict[key]) for key, box in boxes.items() if box is not None])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._staged[index.fqn]


class _PieceLoadPlanner(LoadPlanner):
    """Reads each piece from whichever saved boxes it meets. DCP's own planner knows no box of a plain tensor."""

    def set_up_planner(
        self, state_dict: FlatState, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self._state = state_dict
        self._saved = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for key, value in self._state.items():
            saved, box = self._saved[key], box_of(key, value)
            if box is None:
                continue
            if isinstance(saved, TensorStorageMetadata):
                items += create_read_items_for_chunk_list(key, saved, [_chunk(box)])
            else:
                items.append(_read_object(key))
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return create_default_global_load_plan(global_plan)

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self._state[read_item.dest_index.fqn] = torch.load(value, weights_only=False)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        local = self._state[read_item.dest_index.fqn].local
        return narrow_tensor_by_index(local, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing is left to do: `tensor` is the piece's own memory."""


def _write_item(box: Box, value: Any) -> WriteItem:
    if not isinstance(value, Piece):
        return WriteItem(index=MetadataIndex(box.key), type=WriteItemType.BYTE_IO)
    chunk = _chunk(box)
    return WriteItem(
        index=MetadataIndex(box.key, chunk.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=chunk, properties=TensorProperties.create_from_tensor(value.local), size=value.shape
        ),
    )


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))


def _read_object(key: str) -> ReadItem:
    nothing, index = torch.Size((0,)), MetadataIndex(key)
    return ReadItem(
        type=LoadItemType.BYTE_IO,
        dest_index=index,
        dest_offsets=nothing,
        storage_index=index,
        storage_offsets=nothing,
        lengths=nothing,
    )


def _quiet() -> None:
    """DCP warns whenever there is no process group, and when ranks load different keys; here both are by design."""
    for message in ("torch.distributed is disabled", "Detected mismatched keys"):
        warnings.filterwarnings("ignore", message=message)
