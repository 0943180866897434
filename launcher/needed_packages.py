"""Packages that a configuration asks for, and that only an extra installs."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.config import RunConfig


def check_packages(config: RunConfig) -> None:
    """What the run will need at its end must be there at its beginning. Raises ConfigError where it is not."""
    needs = {"transformers": config.export.format == "hf", "datasets": config.data.source == "huggingface"}
    missing = [package for package, needed in needs.items() if needed and importlib.util.find_spec(package) is None]
    if missing:
        asked = {"transformers": 'export.format = "hf"', "datasets": 'data.source = "huggingface"'}
        listing = ", ".join(f"{asked[package]} needs {package}" for package in missing)
        raise ConfigError(f"{listing}: not installed; install the extra `hf` (pip install '.[hf]'), or change the key")
