"""Preflight on hosts of their own: it passes healthy ones, and names the one whose link is slow."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.requirements import requires
from tests.system.fabric.faults import Fault, slow_link
from tests.system.fabric.hosts import FabricOfHosts
from tests.system.fabric.ranks import HostRank, Ranks

pytestmark = [requires("netns"), pytest.mark.slow]

LINK_MBIT = 400.0
SECONDS = 240.0
SLOW_MBIT = 100.0


@pytest.fixture(scope="module")
def four_hosts() -> Iterator[FabricOfHosts]:
    with FabricOfHosts(hosts_per_leaf=2, foreign_per_leaf=0, link_mbit=LINK_MBIT) as made:
        yield made


def examine(rank: HostRank, directory: str) -> None:
    """`mega doctor --cluster`, in the process of a rank, which it ends. Begins when it is told to."""
    from launcher.cli import main

    rank.parent.send("ready")
    where = rank.parent.recv()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(directory) / f"{rank.rank}.{name}", os.O_CREAT | os.O_WRONLY), number)
    sys.argv = ["mega", "doctor", "--cluster", "--json", "--directory", where]
    main()


def told(fabric: FabricOfHosts, directory: Path, *, code: int, fault: Fault | None = None) -> Any:
    """What it prints on rank 0."""
    (directory / "shared").mkdir()
    with Ranks(fabric, examine, str(directory)) as ranks, contextlib.ExitStack() as injected:
        for rank in range(4):
            ranks.hear(rank, timeout_s=SECONDS)
        if fault is not None:
            injected.enter_context(fault.inject(fabric, ranks))
        for rank in range(4):
            ranks.tell(rank, str(directory / "shared"))
        codes = ranks.exit_codes(timeout_s=SECONDS)
    printed = (directory / "0.out").read_text()
    assert codes == [code, 0, 0, 0], printed + (directory / "0.err").read_text()
    return json.loads(printed)


def test_healthy_hosts_pass(four_hosts: FabricOfHosts, tmp_path: Path) -> None:
    verdict = told(four_hosts, tmp_path, code=0)
    assert verdict["ok"] is True, verdict["findings"]
    assert verdict["details"]["fabric"]["healthy"] is True
    interfaces = {network["interface"] for network in verdict["details"]["network"].values()}
    assert interfaces == {"eth0"}


def test_a_host_with_a_slow_link_is_left_out(four_hosts: FabricOfHosts, tmp_path: Path) -> None:
    slow = slow_link(four_hosts.host_named("h2"), SLOW_MBIT / LINK_MBIT)
    verdict = told(four_hosts, tmp_path, code=3, fault=slow)
    assert verdict["bad_hosts"] == ["h2"], verdict["findings"]
    assert verdict["reasons"]["h2"].startswith("h2 sends and receives slowly: ")
    (finding,) = verdict["findings"]
    assert finding["kind"] == "slow_link"
    # Of TCP; headers, and a busy machine, take their part.
    for way in ("outwards_bytes_per_s", "inwards_bytes_per_s"):
        assert finding["evidence"][way] == pytest.approx(0.9 * SLOW_MBIT * 1e6 / 8, rel=0.25)
