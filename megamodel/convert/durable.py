"""Files that are on the disk, not only in the system's memory, before a name says that they are whole."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Returns once the content of a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """`sync` for every file in a flat folder, then for the folder."""
    for file in sorted(folder.iterdir()):
        sync(file)
    sync(folder)
