"""Documents that are lines of JSON files."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import DataConfig
from data_pipeline.corpus import Document, document_hash
from data_pipeline.errors import DataError
from data_pipeline.file_source import find_files, fingerprint_of_files, relative_name, stamp_of_files
from data_pipeline.files import sha256_of_json


@dataclass(frozen=True, kw_only=True)
class _Line:
    file_index: int
    number: int
    offset: int
    content: bytes


class JsonlCorpus:
    """One document a line, blank lines aside; its identity is its text, so equal texts share a side of the split."""

    def __init__(self, config: DataConfig) -> None:
        self._root, self._paths = find_files(config, default_pattern="**/*.jsonl")
        self._field = config.text_field
        # A row a document: index of its file, line number, byte offset and length. Filled by document_hashes.
        self._index_N4 = np.zeros((0, 4), np.int64)

    def stamp(self) -> str:
        return sha256_of_json([stamp_of_files(self._paths), self._field])

    def fingerprint(self) -> str:
        return sha256_of_json([fingerprint_of_files(self._root, self._paths), self._field])

    def document_hashes(self) -> NDArray[np.uint64]:
        index: list[tuple[int, int, int, int]] = []
        hashes: list[int] = []
        for line in self._lines():
            document = self._parse(line.content, line.file_index, line.number)
            index.append((line.file_index, line.number, line.offset, len(line.content)))
            hashes.append(document_hash(document.text, name=document.name))
        self._index_N4 = np.array(index, np.int64).reshape(-1, 4)
        return np.array(hashes, np.uint64)

    def read(self, index: int) -> Document:
        file_index, number, offset, length = self._index_N4[index].tolist()
        with self._paths[file_index].open("rb") as file:
            file.seek(offset)
            return self._parse(file.read(length), file_index, number)

    def _lines(self) -> Iterator[_Line]:
        for file_index, path in enumerate(self._paths):
            offset = 0
            with path.open("rb") as file:
                for number, content in enumerate(file, start=1):
                    if content.strip():
                        yield _Line(file_index=file_index, number=number, offset=offset, content=content)
                    offset += len(content)

    def _parse(self, content: bytes, file_index: int, number: int) -> Document:
        path: Path = self._paths[file_index]
        where = f"{path}:{number}"
        try:
            record = json.loads(content.decode())
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: byte {error.start} is not utf-8: convert the file (iconv -t utf-8)") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg}): correct or remove this line") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: a JSON object is needed, this is {type(record).__name__}: correct this line")
        if self._field not in record:
            raise DataError(
                f"{where}: no field {self._field!r}, only {sorted(record)}: set data.text_field, or correct this line"
            )
        text = record[self._field]
        if not isinstance(text, str):
            raise DataError(f"{where}: field {self._field!r} is no text but {type(text).__name__}: set data.text_field")
        return Document(name=f"{relative_name(path, self._root)}:{number}", text=text)
