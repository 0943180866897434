"""A run whose story a test tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher.goodput.story import Story


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(root=tmp_path / "run")
