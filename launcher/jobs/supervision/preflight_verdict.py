"""What rank 0 writes of preflight, as the supervisor reads it: `{"ok", "sentences", "bad_hosts", "seconds"}`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class PreflightVerdict:
    """The file `logs/attempt-K/preflight.json`, which is there once all ranks have been looked at."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._said: Mapping[str, Any] | None = None

    def read(self) -> Mapping[str, Any] | None:
        """What it says; None as long as it says nothing."""
        if self._said is None:
            try:
                said = json.loads(self.path.read_text(encoding="utf-8"))
            except (OSError, ValueError):  # not there yet, or being written
                return None
            self._said = said if isinstance(said, dict) else None
        return self._said

    def refusal(self) -> Mapping[str, Any] | None:
        """What it says where it says no."""
        said = self.read()
        return said if said is not None and said.get("ok") is False else None

    @staticmethod
    def as_event(said: Mapping[str, Any]) -> dict[str, Any]:
        """Details of the event `preflight`."""
        return {key: said.get(key) for key in ("ok", "seconds", "sentences", "bad_hosts")}
