"""A diagnosis on real links names what was injected. One seeded case a fault; the campaign in benchmarks/ has hundreds."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.fabric.findings import Finding
from tests.requirements import requires
from tests.system.fabric.diagnosing import DIAGNOSIS_SECONDS, DiagnosingRanks, is_told
from tests.system.fabric.faults import FAULTS, Expected, Fault, draw_fault, gone_rank, slow_host, slow_sender
from tests.system.fabric.hosts import FabricOfHosts
from tests.system.fabric.ranks import HostRank, Ranks

pytestmark = [requires("netns"), pytest.mark.slow]

SEED = 11


@pytest.fixture(scope="module")
def diagnosing(fabric: FabricOfHosts) -> Iterator[DiagnosingRanks]:
    with DiagnosingRanks(fabric) as ranks:
        yield ranks


def findings_of(diagnosing: DiagnosingRanks) -> list[Finding]:
    return [Finding.from_data(data) for data in diagnosing.diagnose()["verdict"]["findings"]]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(fabric: FabricOfHosts, diagnosing: DiagnosingRanks, name: str) -> None:
    fault = draw_fault(np.random.default_rng([SEED, FAULTS.index(name)]), name, fabric)
    with fault.inject(fabric, diagnosing.ranks):
        findings = findings_of(diagnosing)
    assert is_told([fault], findings), account(fault, findings)


@pytest.mark.parametrize("turn", range(2))
def test_a_healthy_fabric_is_called_healthy(diagnosing: DiagnosingRanks, turn: int) -> None:
    findings = findings_of(diagnosing)
    assert not findings, [finding.sentence for finding in findings]


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_a_rank_that_is_gone_is_named(fabric: FabricOfHosts, seed: int) -> None:
    fault = gone_rank(np.random.default_rng(seed), fabric)
    with DiagnosingRanks(fabric) as diagnosing, fault.inject(fabric, diagnosing.ranks):
        findings = findings_of(diagnosing)
    assert is_told([fault], findings), account(fault, findings)


def run_mega(rank: HostRank, words: list[str], directory: str) -> None:
    """The command line, in the process of a rank, which it ends. What it prints goes to files. Begins when it is told to."""
    from launcher.cli import main

    rank.parent.send("ready")
    rank.parent.recv()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(directory) / f"{rank.rank}.{name}", os.O_CREAT | os.O_WRONLY), number)
    sys.argv = ["mega", *words]
    main()


def told_by_the_command_line(
    fabric: FabricOfHosts, fault: Fault | None, directory: Path, *options: str, code: int
) -> dict[str, Any]:
    """What `mega fabric diagnose --json` prints on rank 0, with `fault` injected, where it ends with `code`."""
    words = ["fabric", "diagnose", "--json", *options]
    with Ranks(fabric, run_mega, words, str(directory)) as ranks, contextlib.ExitStack() as injected:
        # Not before the ranks are what they will be: a quota binds those that are scheduled like others.
        for rank in range(len(ranks.hosts)):
            ranks.hear(rank, timeout_s=DIAGNOSIS_SECONDS)
        if fault is not None:
            injected.enter_context(fault.inject(fabric, ranks))
        for rank in range(len(ranks.hosts)):
            ranks.tell(rank, "go")
        codes = ranks.exit_codes(timeout_s=DIAGNOSIS_SECONDS)
    printed = (directory / "0.out").read_text()
    assert codes == [code] + [0] * 7, printed + (directory / "0.err").read_text()
    assert all((directory / f"{rank}.out").read_text() == "" for rank in range(1, 8)), "rank 0 alone prints"
    told: dict[str, Any] = json.loads(printed)
    return told


def test_the_command_line_names_a_slow_link_and_excludes_its_host(fabric: FabricOfHosts, tmp_path: Path) -> None:
    fault = slow_sender(fabric.host_named("h3"), 0.5)
    exclude = tmp_path / "exclude"
    told = told_by_the_command_line(fabric, fault, tmp_path, "--exclude-file", str(exclude), code=3)
    assert told["healthy"] is False
    first = Finding.from_data(told["findings"][0])
    assert Expected(kind="slow_sender", hosts=("h3",)).is_met_by(first), first
    assert first.sentence.startswith("h3 ")
    assert told["beta_s_per_byte"] > 0
    assert told["seconds"] > 0
    assert exclude.read_text() == "h3\n"


def test_the_command_line_names_a_slow_host(fabric: FabricOfHosts, tmp_path: Path) -> None:
    fault = slow_host(fabric.host_named("h5"), 0.6)
    told = told_by_the_command_line(fabric, fault, tmp_path, code=3)
    findings = [Finding.from_data(data) for data in told["findings"]]
    assert is_told([fault], findings), account(fault, findings)


def test_the_command_line_calls_a_healthy_fabric_healthy(fabric: FabricOfHosts, tmp_path: Path) -> None:
    told = told_by_the_command_line(fabric, None, tmp_path, code=0)
    assert told["healthy"] is True, told["findings"]


def account(fault: Fault, findings: list[Finding]) -> str:
    said = "\n".join(finding.sentence for finding in findings) or "healthy"
    return f"seed {SEED}: injected {fault.name} {dict(fault.settings)}; told:\n{said}"
