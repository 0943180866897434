"""What an export says of where it comes from. Imports without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ORIGIN_NAME = "mega.json"


def read_origin(export: Path) -> dict[str, Any] | None:
    """What the export in this folder was given as its origin; None where there is no whole export, or it does not say."""
    try:
        origin = json.loads((export / ORIGIN_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return origin if isinstance(origin, dict) and (export / "config.json").is_file() else None
