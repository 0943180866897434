"""Who is wrong where ranks differ: the fewer, and nobody where there is no clear majority."""

from __future__ import annotations

from cluster.preflight.differences import (
    ENVIRONMENT,
    PACKAGES,
    SOURCES,
    VERSIONS,
    differences,
    section_differences,
)
from cluster.preflight.verdict import PreflightFinding

FOUR = {rank: f"n{rank}" for rank in range(4)}
PAIRS = {rank: f"n{rank // 2}" for rank in range(6)}


def the_one(findings: list[PreflightFinding]) -> PreflightFinding:
    assert len(findings) == 1, findings
    return findings[0]


def test_equal_ranks_are_no_finding() -> None:
    assert differences({rank: {"torch": "2.13.0"} for rank in range(4)}, FOUR, VERSIONS) == []


def test_the_host_that_differs_from_most_is_bad_and_told_with_both_values() -> None:
    values = {rank: {"torch": "2.13.0", "numpy": "2.4", "Python": "3.11"} for rank in range(4)}
    values[2] |= {"torch": "2.12.0", "numpy": "2.0"}
    finding = the_one(differences(values, FOUR, VERSIONS))
    assert (finding.kind, finding.severity) == ("version", "error")
    assert (finding.hosts, finding.ranks, finding.bad_hosts) == (("n2",), (2,), ("n2",))
    assert finding.sentence == (
        "n2 differs from the others in the version of numpy (2.0 there, and 2.4 elsewhere) and torch (2.12.0 there, and "
        "2.13.0 elsewhere). Install the same on all hosts, or use one container image."
    )
    assert finding.evidence["torch"] == {"2.13.0": ["n0", "n1", "n3"], "2.12.0": ["n2"]}


def test_hosts_that_differ_in_different_things_are_told_apart() -> None:
    values = {rank: {"NCCL_IB_TC": "106", "PYTHONPATH": "/a"} for rank in range(4)}
    values[1]["NCCL_IB_TC"] = "0"
    del values[3]["PYTHONPATH"]
    first, second = differences(values, FOUR, ENVIRONMENT)
    assert (first.bad_hosts, second.bad_hosts) == (("n1",), ("n3",))
    assert second.sentence.startswith(
        "n3 differs from the others in the variable PYTHONPATH (not set there, and /a elsewhere)"
    )


def test_one_rank_of_a_host_is_told_by_its_number() -> None:
    values = {rank: {"transformers": "5.0"} for rank in range(6)}
    values[3] = {}
    finding = the_one(differences(values, PAIRS, PACKAGES))
    assert finding.sentence.startswith(
        "n1 (rank 3) differs from the others in the installed package transformers (not installed there, and 5.0 elsewhere)"
    )
    assert finding.bad_hosts == ("n1",)


def test_a_package_that_no_rank_trains_with_may_differ() -> None:
    values = {rank: {"tokenizers": "0.22", "nvidia-cublas": "13.0", "black": "25.1"} for rank in range(4)}
    assert section_differences("packages", values, FOUR) == []
    values[1] |= {"black": "24.0", "nvidia-ml-py": "13.5"}
    harmless = the_one(section_differences("packages", values, FOUR))
    assert (harmless.kind, harmless.severity) == ("package", "warning")
    assert (harmless.hosts, harmless.bad_hosts) == (("n1",), ())
    assert "black (24.0 there, and 25.1 elsewhere) and nvidia-ml-py (13.5 there, and not installed" in harmless.sentence
    halves = {rank: {"black": f"{rank // 2}"} for rank in range(4)}
    assert the_one(section_differences("packages", halves, FOUR)).severity == "warning"
    values[2] |= {"nvidia-cublas": "12.9", "tokenizers": "0.21"}
    harmful, _ = section_differences("packages", values, FOUR)
    assert (harmful.severity, harmful.bad_hosts) == ("error", ("n2",))
    assert "nvidia-cublas (12.9 there, and 13.0 elsewhere) and tokenizers (0.21 there" in harmful.sentence


def test_other_sections_stop_a_run() -> None:
    values = {rank: {"torch": "2.13.0"} for rank in range(4)}
    values[1] = {"torch": "2.12.0"}
    finding = the_one(section_differences("versions", values, FOUR))
    assert (finding.kind, finding.severity, finding.bad_hosts) == ("version", "error", ("n1",))


def test_of_two_halves_nobody_can_say_which_is_right() -> None:
    values = {rank: {"torch": "2.13.0" if rank < 2 else "2.12.0"} for rank in range(4)}
    finding = the_one(differences(values, FOUR, VERSIONS))
    assert finding.bad_hosts == ()
    assert finding.hosts == ("n0", "n1", "n2", "n3")
    assert finding.sentence.startswith(
        "Ranks differ, and nobody can say which are right, in the version of torch (2.13.0 on n0 and n1 and 2.12.0 on n2 and "
        "n3)"
    )


def test_a_plurality_is_no_majority() -> None:
    values = {rank: {"torch": version} for rank, version in enumerate(("1", "1", "2", "3"))}
    assert the_one(differences(values, FOUR, VERSIONS)).bad_hosts == ()


def test_where_every_host_has_a_rank_that_differs_none_is_bad() -> None:
    values = {rank: {"OMP_NUM_THREADS": "4"} for rank in range(6)}
    for rank in (0, 3):
        values[rank] = {"OMP_NUM_THREADS": "2"}
    assert the_one(differences(values, PAIRS, ENVIRONMENT)).bad_hosts == ("n0", "n1")
    hosts = {rank: f"n{rank // 3}" for rank in range(6)}
    assert the_one(differences(values, hosts, ENVIRONMENT)).bad_hosts == ()


def test_of_sources_the_names_are_told_and_no_hashes_and_not_all_of_many() -> None:
    values = {rank: {f"cluster/{name}.py": "aaaa" for name in "abcdef"} for rank in range(4)}
    values[0] = dict.fromkeys(values[0], "bbbb")
    finding = the_one(differences(values, FOUR, SOURCES))
    assert "cluster/a.py, cluster/b.py, cluster/c.py, cluster/d.py and 2 more" in finding.sentence
    assert "aaaa" not in finding.sentence
    assert len(finding.evidence) == 6


def test_a_long_value_is_cut() -> None:
    values = {rank: {"LD_LIBRARY_PATH": "/lib"} for rank in range(4)}
    values[0] = {"LD_LIBRARY_PATH": "/opt:" * 100}
    assert len(the_one(differences(values, FOUR, ENVIRONMENT)).sentence) < 400
