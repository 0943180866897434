"""`mega launch --on torchrun`: what it shows, what it refuses, and a run on this host alone."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests.launcher.conftest import Mega


def test_a_dry_run_shows_torchrun_and_starts_nothing(tiny: Path, mega: Mega) -> None:
    where = ("--nodes", "2", "--node-rank", "1", "--rendezvous", "n0:29400")
    shown = mega("launch", tiny, "--on", "torchrun", *where, "--dry-run", "--json")
    assert shown.code == 0, shown.err
    assert "torchrun --nnodes 2 --nproc-per-node 1 --node-rank K" in shown.json["starter"]
    assert (shown.json["nodes"], shown.json["ranks"]) == (2, 2)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--nodes", "2"), "must know of the other hosts"),
        (("--nodes", "2", "--node-rank", "0"), "--rendezvous HOST:PORT is missing"),
        (("--hostfile", "hosts"), "is not in the hostfile"),
    ],
)
def test_options_that_make_no_sense_start_nothing(
    tiny: Path, mega: Mega, options: tuple[str, ...], message: str
) -> None:
    Path("hosts").write_text("elsewhere0\nelsewhere1\n")
    ended = mega("launch", tiny, "--on", "torchrun", *options)
    assert ended.code == 2
    assert message in ended.err
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_run_on_this_host_alone(tiny: Path, mega_process: Mega) -> None:
    settings = (
        "--set",
        "launch.ranks_per_node=2",
        "--set",
        "export.format=none",
        "--set",
        "launch.preflight.fabric=false",
    )
    ended = mega_process("launch", tiny, "--on", "torchrun", *settings, "--json")
    assert ended.code == 0, ended.err
    assert (ended.json["steps"], ended.json["finished"]) == (4, True)
    run = Path("runs/tiny")
    steps = [
        json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if "grad_norm" in line
    ]
    assert steps == [1, 2, 3, 4]
    job = json.loads((run / "launch" / "job.json").read_text())
    assert (job["backend"], job["submitted_from"]) == ("torchrun", socket.gethostname())
    assert (run / "logs" / "attempt-1" / "torchrun-0.log").exists()
