"""A diagnosis on real links names what was injected. One seeded case a fault; the campaign in benchmarks/ has hundreds."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster.fabric.findings import Finding
from tests.requirements import requires
from tests.system.fabric.diagnosing import DIAGNOSIS_SECONDS, DiagnosingRanks, is_told
from tests.system.fabric.faults import FAULTS, Expected, Fault, draw_fault, gone_rank, slow_sender
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
    """The command line, in the process of a rank, which it ends. What it prints goes to files."""
    from launcher.cli import main

    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(directory) / f"{rank.rank}.{name}", os.O_CREAT | os.O_WRONLY), number)
    sys.argv = ["mega", *words]
    main()


def test_the_command_line_names_a_fault_and_excludes_its_host(fabric: FabricOfHosts, tmp_path: Path) -> None:
    fault = slow_sender(fabric.host_named("h3"), 0.5)
    exclude = tmp_path / "exclude"
    words = ["fabric", "diagnose", "--json", "--exclude-file", str(exclude)]
    with Ranks(fabric, run_mega, words, str(tmp_path)) as ranks, fault.inject(fabric, ranks):
        codes = ranks.exit_codes(timeout_s=DIAGNOSIS_SECONDS)
    assert codes == [3] + [0] * 7, (tmp_path / "0.err").read_text()
    printed = json.loads((tmp_path / "0.out").read_text())
    assert printed["healthy"] is False
    first = Finding.from_data(printed["findings"][0])
    assert Expected(kind="slow_sender", hosts=("h3",)).is_met_by(first), first
    assert first.sentence.startswith("h3 ")
    assert printed["beta_s_per_byte"] > 0
    assert printed["seconds"] > 0
    assert exclude.read_text() == "h3\n"
    assert all((tmp_path / f"{rank}.out").read_text() == "" for rank in range(1, 8)), "rank 0 alone prints"


def account(fault: Fault, findings: list[Finding]) -> str:
    said = "\n".join(finding.sentence for finding in findings) or "healthy"
    return f"seed {SEED}: injected {fault.name} {dict(fault.settings)}; told:\n{said}"
