"""Documents that are files: the standard library's sources, and folders of text."""

import io
import os
import sysconfig
import tokenize
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import DataConfig
from data_pipeline.corpus import Document, document_hash
from data_pipeline.errors import DataError
from data_pipeline.files import sha256_of_file, sha256_of_json

# Tests repeat themselves and hold files that are broken on purpose; site-packages differs from machine to machine.
_STDLIB_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class FileCorpus:
    """One document a file; its identity is its path relative to the root."""

    def __init__(self, config: DataConfig) -> None:
        self._is_python = config.source == "stdlib"
        if self._is_python:
            self._root = Path(sysconfig.get_paths()["stdlib"])
            self._paths = _python_sources(self._root, config.file_pattern)
        else:
            self._root, self._paths = find_files(config, default_pattern="**/*.txt")

    def stamp(self) -> str:
        return stamp_of_files(self._paths)

    def fingerprint(self) -> str:
        return fingerprint_of_files(self._root, self._paths)

    def document_hashes(self) -> NDArray[np.uint64]:
        names = (relative_name(path, self._root) for path in self._paths)
        return np.array([document_hash(name, name=name) for name in names], np.uint64)

    def read(self, index: int) -> Document:
        path = self._paths[index]
        content = path.read_bytes()
        encoding = _declared_encoding(content, path) if self._is_python else "utf-8"
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: byte {error.start} is not {encoding}: convert the file (iconv -t utf-8), "
                "or leave it out with data.file_pattern"
            ) from error
        return Document(name=relative_name(path, self._root), text=text)


def find_files(config: DataConfig, *, default_pattern: str) -> tuple[Path, list[Path]]:
    """The root and the sorted files that `data.path` and `data.file_pattern` name; at least one, or DataError."""
    assert config.path is not None, "the config requires a path for this source"
    path = Path(config.path).expanduser()
    if path.is_file():
        return path.parent, [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder: correct data.path")
    pattern = config.file_pattern or default_pattern
    paths = sorted(found for found in path.glob(pattern) if found.is_file())
    if not paths:
        raise DataError(f"{path}: no file matches {pattern!r}: correct data.path or data.file_pattern")
    return path, paths


def relative_name(path: Path, root: Path) -> str:
    """A file's path below the root, the same on every machine."""
    return path.relative_to(root).as_posix()


def stamp_of_files(paths: list[Path]) -> str:
    """A hash of absolute paths, sizes and times of change."""
    stats = [(str(path.absolute()), path.stat()) for path in paths]
    return sha256_of_json([[name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats])


def fingerprint_of_files(root: Path, paths: list[Path]) -> str:
    """A hash of relative paths and contents."""
    return sha256_of_json([[relative_name(path, root), sha256_of_file(path)] for path in paths])


def _python_sources(root: Path, pattern: str | None) -> list[Path]:
    paths: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_LEFT_OUT]
        paths += [Path(folder) / name for name in names if name.endswith(".py")]
    if not paths:
        raise DataError(
            f'{root}: this Python has no .py sources of its standard library: set data.source = "text" and data.path'
        )
    if pattern is not None:
        wanted = set(root.glob(pattern))
        paths = [path for path in paths if path in wanted]
        if not paths:
            raise DataError(f"{root}: no source matches {pattern!r}: correct data.file_pattern")
    return sorted(paths)


def _declared_encoding(content: bytes, path: Path) -> str:
    try:
        return tokenize.detect_encoding(io.BytesIO(content).readline)[0]
    except SyntaxError as error:
        raise DataError(f"{path}: {error.msg}: this source of the standard library is damaged") from error
