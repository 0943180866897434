"""Preflight over real ranks: each injected difference is found on the rank that has it, and all ranks hear the outcome."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.fabric.measured.fabric import MeasuredFabric, run_on_fabric
from cluster.fabric.measured.place import FabricPlace, MeasureOptions
from cluster.preflight.facts import RankFacts
from cluster.preflight.run import PreflightSettings, run_preflight, tell_ranks
from cluster.preflight.verdict import PreflightVerdict
from parallel.world import World
from tests.gloo_pool import GlooPool

OPTIONS = MeasureOptions(transport="gloo", start_timeout_s=30.0, silence_s=5.0, round_timeout_s=15.0, lazy=True)
Answer = Callable[[dict[str, Any]], dict[str, Any]]
Change = Callable[[int, dict[str, Any], Answer], dict[str, Any]]
"""Of a rank's answer to a question: rank, question, how it would answer."""


def preflight(
    world: World,
    directory: str,
    change: Change = lambda rank, question, answer: answer(question),
    *,
    options: MeasureOptions = OPTIONS,
    world_size: int | None = None,
    hosts: tuple[str, ...] = (),
    **settings: Any,
) -> tuple[dict[str, Any] | None, Any]:
    """The verdict as data on rank 0, and what this rank has heard of it."""
    facts = RankFacts(
        environ={"NCCL_IB_TC": "106"},
        packages=("cluster",),
        local_rank=0,
        network={"kind": "socket", "has": {}, "interface_mbit": None},
    )
    limits: dict[str, Any] = {"max_clock_offset_s": 5.0, "min_free_bytes": 0.0, "measures_fabric": False, **settings}
    place = FabricPlace(
        rank=world.rank,
        world_size=world_size or world.world_size,
        local_rank=0,
        local_world_size=1,
        address=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        host=f"n{world.rank}",
        agent_store=True,
        hosts=hosts,
    )

    def work(fabric: MeasuredFabric) -> dict[str, Any]:
        verdict = run_preflight(fabric, PreflightSettings(directory=Path(directory), **limits))
        tell_ranks(fabric, verdict)
        return verdict.as_data()

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        return change(world.rank, question, facts.answer)

    return run_on_fabric(place, options, work, answer=answer), facts.verdict


def verdict_of(results: list[Any]) -> PreflightVerdict:
    return PreflightVerdict.from_data(results[0][0])


def test_ranks_that_are_alike_on_hosts_that_fit_pass(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    results = gloo_ranks(3, preflight, str(tmp_path / "new" / "run"))
    verdict = verdict_of(results)
    assert verdict.ok, verdict.findings
    assert list((tmp_path / "new" / "run").iterdir()) == [], "what was written to look at the folder is removed"
    assert verdict.details["hosts"] == {"n0": [0], "n1": [1], "n2": [2]}
    assert verdict.details["clock_offset_s"].keys() == {"n0", "n1", "n2"}
    assert verdict.details["free_bytes"]["n1"] > 0
    assert verdict.details["fabric"] == {"skipped": "it is switched off"}
    assert verdict.details["stage_seconds"].keys() == {"ranks", "files", "clocks", "fabric"}
    assert [heard for _, heard in results] == [{"ask": "verdict", "ok": True, "sentences": []}] * 3


def measured(world: World, directory: str) -> Any:
    return preflight(world, directory, measures_fabric=True)


def test_the_fabric_is_measured_between_hosts(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    verdict = verdict_of(gloo_ranks(2, measured, str(tmp_path)))
    assert verdict.details["fabric"]["beta_s_per_byte"] > 0
    assert not {finding.kind for finding in verdict.findings} & {"version", "environment", "clock", "shared_files"}


def with_differences(world: World, directory: str) -> Any:
    def change(rank: int, question: dict[str, Any], answer: Answer) -> dict[str, Any]:
        if question["ask"] == "section" and question["section"] == "environment" and rank == 1:
            return {"values": {"NCCL_IB_TC": "0"}}
        said = answer(question)
        if question["ask"] == "rank":
            if rank == 1:
                said["hashes"]["environment"] = "another"
                said["device"]["error"] = "1 of 512 rows of a float32 matrix product are wrong"
            if rank == 2:
                said["network"] = {"kind": "socket", "has": {}, "interface_mbit": 1000}
        if question["ask"] == "clock" and rank == 2:
            said["time"] -= 3600.0
        if question["ask"] == "host" and rank == 2:
            said["free_bytes"] = 10
        return said

    return preflight(world, directory, change, min_free_bytes=1e3)


def test_each_difference_is_found_where_it_is(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    results = gloo_ranks(3, with_differences, str(tmp_path))
    verdict = verdict_of(results)
    bad = {finding.kind: finding.bad_hosts for finding in verdict.findings}
    assert bad == {"environment": ("n1",), "device": ("n1",), "network": ("n2",), "disk": ("n2",), "clock": ("n2",)}
    assert verdict.bad_hosts == ("n1", "n2")
    environment = next(finding for finding in verdict.findings if finding.kind == "environment")
    assert "NCCL_IB_TC (0 there, and 106 elsewhere)" in environment.sentence
    for _, heard in results:
        assert heard["ok"] is False
        assert len(heard["sentences"]) == 5


def with_another_torch(world: World, directory: str) -> Any:
    def change(rank: int, question: dict[str, Any], answer: Answer) -> dict[str, Any]:
        said = answer(question)
        if rank == 1 and question["ask"] == "rank":
            said["hashes"]["versions"] = "another"
        if rank == 1 and question["ask"] == "section":
            said["values"] = {**said["values"], "torch": "1.0"}
        return said

    return preflight(world, directory, change, measures_fabric=True)


def test_ranks_with_another_torch_are_told_before_anybody_connects(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    verdict = verdict_of(gloo_ranks(3, with_another_torch, str(tmp_path)))
    (finding,) = verdict.findings
    assert (finding.kind, finding.bad_hosts) == ("version", ("n1",))
    assert "torch (1.0 there, and " in finding.sentence
    assert verdict.details["fabric"]["skipped"] == "ranks with different versions may not understand one another"


def with_another_folder(world: World, directory: str, which: str) -> Any:
    def change(rank: int, question: dict[str, Any], answer: Answer) -> dict[str, Any]:
        if rank == 1 and question["ask"] == "host":
            elsewhere = Path(directory) / "elsewhere"
            if which == "writes elsewhere":
                (elsewhere / question["folder"]).mkdir(parents=True)
                (elsewhere / question["folder"] / "from-rank-0").write_text(question["nonce"])
            return answer({**question, "directory": str(elsewhere)})
        return answer(question)

    return preflight(world, directory, change)


def test_a_host_with_a_folder_of_its_own_is_named(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    (finding,) = verdict_of(gloo_ranks(3, with_another_folder, str(tmp_path), "has none")).findings
    assert (finding.kind, finding.bad_hosts) == ("shared_files", ("n1",))
    assert "n1 does not see what rank 0 wrote to .preflight-" in finding.sentence
    assert "there (No such file or directory)" in finding.sentence


def test_a_host_whose_writes_nobody_sees_is_named(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    (finding,) = verdict_of(gloo_ranks(3, with_another_folder, str(tmp_path), "writes elsewhere")).findings
    assert (finding.kind, finding.bad_hosts) == ("shared_files", ("n1",))
    assert "n1 writes there, and rank 0's host does not see it" in finding.sentence


def test_a_folder_that_nobody_can_make_is_nobodys_fault(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    (finding,) = verdict_of(gloo_ranks(2, preflight, str(tmp_path / "file"))).findings
    assert (finding.kind, finding.hosts, finding.bad_hosts) == ("shared_files", ("n0", "n1"), ())
    assert finding.sentence == (
        f"{tmp_path / 'file'} is not the same for all hosts: n0 cannot write there (Not a directory) and n1 cannot write "
        "there (Not a directory). Set run.directory to a file system that all hosts share and may write."
    )


def without_the_last(world: World, directory: str, hosts: tuple[str, ...]) -> Any:
    options = replace(OPTIONS, start_timeout_s=6.0)
    return preflight(world, directory, options=options, world_size=3, hosts=hosts)


def test_a_rank_that_never_came_is_missing_and_the_others_hear_of_it(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    results = gloo_ranks(2, without_the_last, str(tmp_path), ("n0", "n1", "n2"))
    (finding,) = verdict_of(results).findings
    assert (finding.kind, finding.hosts, finding.ranks, finding.bad_hosts) == ("missing_rank", ("n2",), (2,), ("n2",))
    assert finding.sentence == (
        "Rank 2 (n2) did not answer during the start: gone, stopped, or cut off. Look at the end of its log, and at the host."
    )
    assert results[1][1]["sentences"] == [finding.sentence]


def test_of_a_rank_that_never_came_the_host_may_be_unknown(gloo_ranks: GlooPool, tmp_path: Path) -> None:
    (finding,) = verdict_of(gloo_ranks(2, without_the_last, str(tmp_path), ())).findings
    assert (finding.hosts, finding.ranks, finding.bad_hosts) == ((), (2,), ())
