"""Ranks that end with exit code 0 before the run is done: that is believed only where the run has left its result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.launcher.jobs.made_up_hosts import MadeUpJob

_SECOND_GOES_WELL = """
if attempt == 2:
    if rank == 0:
        checkpoint(4)
    finish()
step(3)
mark("stepped")
"""


def test_rank_0_that_ends_without_a_result_has_failed(tmp_path: Path) -> None:
    job = MadeUpJob(
        tmp_path, ["a", "b"], _SECOND_GOES_WELL + "if rank == 1:\n    hang()\nos._exit(0)", launch="nodes = 2"
    )
    job.patience = replace(job.patience, own_end=0.1)
    assert job.supervise().exit_code == 0
    (failure,) = job.events("failure")
    assert (failure["kind"], failure["rank"], failure["host"]) == ("exit", 0, "a")
    assert failure["message"] == "rank 0 of 2 on a ended before the run was done, with exit code 0 (after step 3)"
    assert (job.state().restarts, len(job.events("done"))) == (1, 1)


def test_a_rank_that_ends_early_is_the_cause_and_not_those_that_miss_it(tmp_path: Path) -> None:
    script = """
if rank == 1:
    wait_for("stepped-0-1")
    print("that is all", flush=True)
    os._exit(0)
while Path(f"/proc/{(run / 'pid-1-1').read_text()}/fd/0").exists():
    time.sleep(0.01)
lose_peer()
"""
    job = MadeUpJob(
        tmp_path, ["a", "b"], f"{_SECOND_GOES_WELL}mark('two')\nwait_for('two-1-1')\n{script}", launch="nodes = 2"
    )
    assert job.supervise().exit_code == 0
    (failure,) = job.events("failure")
    assert (failure["kind"], failure["rank"]) == ("exit", 1)
    assert failure["message"] == (
        "rank 1 of 2 on b ended before the run was done, with exit code 0: that is all (after step 3)"
    )


def test_others_that_only_hang_without_a_rank_that_ended_early_are_ended_by_the_watch(tmp_path: Path) -> None:
    script = """
if rank == 1:
    wait_for("stepped-0-1")
    find("missing_rank", "rank 1 (b) is gone.", state="dead", collective="all_reduce of 4 MB", axis="dp_shard")
    os._exit(0)
hang()
"""
    launch = "nodes = 2\nend_hangs_after_seconds = 0.2"
    job = MadeUpJob(tmp_path, ["a", "b"], _SECOND_GOES_WELL + script, launch=launch)
    assert job.supervise().exit_code == 0
    (failure,) = job.events("failure")
    assert (failure["kind"], failure["rank"]) == ("exit", 1)
    assert failure["last_collective"] == "all_reduce of 4 MB on dp_shard"


def test_once_all_is_trained_others_may_end_before_rank_0(tmp_path: Path) -> None:
    script = """
if rank == 1:
    wait_for("trained-0-1")
    find("missing_rank", "rank 1 (b) is gone.", state="dead")
    os._exit(0)
if attempt == 2:
    finish()
checkpoint(4)
mark("trained")
time.sleep(1.0)
fail("the export failed")
"""
    launch = "nodes = 2\nend_hangs_after_seconds = 0.01"
    job = MadeUpJob(tmp_path, ["a", "b"], script, launch=launch)
    assert job.supervise().exit_code == 0
    (failure,) = job.events("failure")
    assert (failure["kind"], failure["rank"]) == ("exception", 0)
    assert failure["message"].startswith("rank 0 of 2 on a: the export failed")
