"""Where counters come from: small files below a root, and the answers of commands."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

_COMMAND_TIMEOUT_S = 5.0


class Sources:
    """Files of a host below `root`. Whatever is missing or unreadable is empty: no host has every counter."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def text(self, path: str) -> str:
        """A file's text, `path` relative to the root; empty where it cannot be read."""
        try:
            return (self._root / path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def number(self, path: str) -> int | None:
        """The one whole number of a file."""
        try:
            return int(self.text(path))
        except ValueError:
            return None

    def numbers(self, folder: str) -> Iterator[tuple[str, int]]:
        """Name and number of each file of a folder that holds one whole number, sorted by name."""
        for name in self.names(folder):
            if (number := self.number(f"{folder}/{name}")) is not None:
                yield name, number

    def names(self, folder: str) -> list[str]:
        """What a folder holds, sorted; none where there is no such folder."""
        try:
            return sorted(entry.name for entry in (self._root / folder).iterdir())
        except OSError:
            return []

    def has(self, path: str) -> bool:
        """Whether there is such a file or folder."""
        return (self._root / path).exists()

    def answer(self, *command: str) -> str:
        """What a command prints on this host; below another root, what is recorded of it there.

        The record of `ethtool -S eth0` is `recorded/ethtool -S eth0`. Empty where the command is missing, fails or does not
        answer within five seconds.
        """
        if self._root != Path("/"):
            return self.text(f"recorded/{' '.join(command)}")
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_COMMAND_TIMEOUT_S)
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout
