"""Templates are installed with the packages that read them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("package", "pattern"), [("launcher.jobs.slurm", "*.j2"), ("launcher.report", "*.html")])
def test_the_templates_are_part_of_the_package(package: str, pattern: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    there = {path.name for path in (ROOT / package.replace(".", "/")).glob(pattern)}
    assert there
    assert set(project["tool"]["setuptools"]["package-data"][package]) == there
