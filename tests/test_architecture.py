"""The design's arrows, and what must stay light, held by tests."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_imports_follow_the_contracts() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("package", ["megamodel/model", "data_pipeline", "megamodel/convert", "megamodel/generate"])
def test_who_knows_no_processes_imports_no_torch_distributed(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            assert not [name for name in names if name.startswith("torch.distributed")], file


@pytest.mark.parametrize(
    "module",
    [
        "launcher.cli",
        "launcher.config",
        "megamodel.model.config",
        "megamodel.train.config",
        "megamodel.train.job",
        "megamodel.generate.config",
        "megamodel.convert.config",
        "data_pipeline.config",
        "parallel.config",
        "cluster.config",
        "cluster.hardware",
    ],
)
def test_a_login_node_can_check_a_config_without_torch(module: str) -> None:
    script = f"import sys, {module}; sys.exit(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)) or 0)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found.stderr


def test_only_the_documented_places_read_the_environment() -> None:
    """Below the launcher: the world of ranks, the choice of a compiler, and DeepSpeed, which takes no other way to be told
    what the device is."""
    allowed = {"parallel/world.py", "parallel/deepspeed_setup.py", "megamodel/train/build.py"}
    readers = {
        str(file.relative_to(ROOT))
        for package in ("megamodel", "parallel", "data_pipeline", "cluster")
        for file in (ROOT / package).rglob("*.py")
        if "os.environ" in file.read_text() or "getenv" in file.read_text()
    }
    assert readers <= allowed
