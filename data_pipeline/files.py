"""Bytes on disk: hashes, and writes that are either whole or absent."""

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sync_to_disk(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file; it is on disk on return, and never half-written under its name."""
    partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex}")
    partial.write_bytes(content)
    sync_to_disk(partial)
    partial.replace(path)
    sync_to_disk(path.parent)
