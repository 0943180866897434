"""Folders of safetensors files with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megamodel.convert.durable import sync
from megamodel.errors import ConversionError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor to be written: made only when its file is."""

    name: str
    num_bytes: int
    make: Callable[[], Tensor]


def write_shards(folder: Path, tensors: Sequence[PlannedTensor], max_shard_bytes: int) -> None:
    """Writes the tensors in this order into files of at most `max_shard_bytes`, and the index last: a folder whose writing
    was cut short holds no index and is not taken for whole. Weights that stood there before are removed first."""
    for old in (folder / INDEX_NAME, folder / SINGLE_NAME, *sorted(folder.glob("model-*-of-*.safetensors"))):
        old.unlink(missing_ok=True)
    shards: list[list[PlannedTensor]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.num_bytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({tensor.name: tensor.make() for tensor in shard}, folder / file_name, metadata={"format": "pt"})
        sync(folder / file_name)
        weight_map.update({tensor.name: file_name for tensor in shard})
    index = {
        "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    partial = folder / f"{INDEX_NAME}.partial"
    partial.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    sync(partial)
    sync(folder)
    partial.replace(folder / INDEX_NAME)
    sync(folder)


@dataclass(frozen=True, kw_only=True)
class ShardFolder:
    """Which file of a folder holds which tensor."""

    folder: Path
    file_of: dict[str, str]

    @classmethod
    def open(cls, folder: Path) -> ShardFolder:
        """Reads the index, or the one file where there is none. Raises ConversionError naming the file at fault."""
        if (folder / INDEX_NAME).is_file():
            file_of = _read_index(folder / INDEX_NAME)
        elif (folder / SINGLE_NAME).is_file():
            file_of = dict.fromkeys(_names(folder / SINGLE_NAME), SINGLE_NAME)
        else:
            raise ConversionError(
                f"{folder} has neither {INDEX_NAME} nor {SINGLE_NAME}; other formats (pytorch_model.bin) are not read"
            )
        result = cls(folder=folder, file_of=file_of)
        for file_name in result.files:
            listed = {name for name, file in file_of.items() if file == file_name}
            present = set(_names(folder / file_name))
            if listed - present:
                raise ConversionError(
                    f"{folder / file_name} lacks tensor {min(listed - present)}, which {INDEX_NAME} says it holds"
                )
            if present - listed:
                raise ConversionError(
                    f"{folder / file_name} holds tensor {min(present - listed)}, which {INDEX_NAME} does not list there"
                )
        return result

    @property
    def files(self) -> list[str]:
        """Names of the weight files."""
        return sorted(set(self.file_of.values()))

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, file by file."""
        for file_name in self.files:
            with _open(self.folder / file_name) as file:
                for name in names:
                    if self.file_of[name] == file_name:
                        yield name, file.get_tensor(name)


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        file_of = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{index} is not an index of weight files: {error!r}") from error
    for file_name in sorted(set(file_of.values())):
        if Path(file_name).name != file_name:
            raise ConversionError(f"{index} names {file_name!r}; weight files must lie in the same folder")
        if not (index.parent / file_name).is_file():
            raise ConversionError(f"{index} names {file_name}, which is not there; fetch the checkpoint again")
    return file_of


def _names(file: Path) -> list[str]:
    with _open(file) as opened:
        return list(opened.keys())


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{file} is damaged or no safetensors file: {error}; fetch or write it again") from error
