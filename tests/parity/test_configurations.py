"""The two configurations that show on any machine that layouts are equal, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.parity.harness import LOSS_TOLERANCE, NORM_TOLERANCE

ROOT = Path(__file__).parent.parent.parent


def steps_of(folder: Path, name: str, configuration: str, *arguments: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are steps, of one run."""
    settings = [
        f"run.name={name}",
        f"run.directory={folder}",
        f"data.cache_directory={folder / 'cache'}",
        "run.device=cpu",
    ]
    sets = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "launcher", "train", str(ROOT / "configs" / configuration), *sets, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize(
    ("configuration", "layout"),
    [("parity.toml", ["parallel.pp=2"]), ("parity-dense.toml", ["parallel.tp=2", "parallel.data_engine=fsdp2"])],
)
def test_two_ranks_record_what_one_does(tmp_path: Path, configuration: str, layout: list[str]) -> None:
    alone = steps_of(tmp_path, "alone", configuration)
    sets = [word for setting in layout for word in ("--set", setting)]
    spread = steps_of(tmp_path, "spread", configuration, "--ranks", "2", *sets)
    assert [line["step"] for line in spread] == list(range(1, 21))
    for here, there in zip(spread, alone, strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=LOSS_TOLERANCE, abs=0), here["step"]
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=NORM_TOLERANCE, abs=0), here["step"]
    assert "pipeline_bubble" not in alone[0]
    if "parallel.pp=2" in layout:
        assert all(0 < line["pipeline_bubble"] < 1 for line in spread)
