"""`mega launch --on slurm` on hosts of a real SLURM: the run computes what one machine computes, whatever happens to it."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.requirements import require
from tests.system.slurm.cluster import MPI_ENVIRONMENT, SlurmOfHosts
from tests.system.slurm.launched import (
    EVERY_STEPS,
    RANKS,
    STEPS,
    LaunchedFigures,
    LaunchedRun,
    assert_equal_figures,
    figures_of,
    undisturbed,
    write_run_files,
)
from tests.system.slurm.scenarios import SCENARIOS, Harm, Scenario, mend, small_disk

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launch")


@pytest.fixture(scope="module")
def disk(root: Path) -> Iterator[Path]:
    require("netns")
    with small_disk(root / "disk") as made:
        yield made


@pytest.fixture(scope="module")
def slurm(disk: Path) -> Iterator[SlurmOfHosts]:
    """Four hosts and a spare one, which see the small disk."""
    require("slurm")
    with SlurmOfHosts(spare=1) as made:
        yield made


@pytest.fixture(scope="module")
def whole(root: Path) -> LaunchedFigures:
    """What an undisturbed run computes on one machine."""
    write_run_files(root)
    return undisturbed(root)


@pytest.fixture(autouse=True)
def _mended(slurm: SlurmOfHosts) -> Iterator[None]:
    yield
    for job in slurm.run("squeue", "--noheader", "--format=%i").stdout.split():
        slurm.run("scancel", job, check=False)
    mend(slurm)


def test_a_launched_run_computes_what_one_machine_computes(
    slurm: SlurmOfHosts, root: Path, whole: LaunchedFigures
) -> None:
    run = LaunchedRun(cluster=slurm, root=root, name="plain", settings=("launch.preflight.fabric=true",))
    job = run.launch()
    run.finish()
    assert run.figures() == whole
    status = run.status()
    assert {key: status[key] for key in ("state", "step", "restarts", "cause", "excluded_hosts")} == {
        "state": "finished",
        "step": STEPS,
        "restarts": 0,
        "cause": None,
        "excluded_hosts": [],
    }
    assert slurm.wait_for(job, "COMPLETED", 30)["JobName"] == "mega-plain"
    run.wait_until_nothing_is_left()
    # Four hosts, one rank each.
    (attempt,) = run.events("attempt")
    assert len(set(attempt["hosts"])) == RANKS == attempt["num_ranks"]
    (preflight,) = run.events("preflight")
    assert preflight["ok"]


def test_one_task_a_rank_under_pmix(slurm: SlurmOfHosts, root: Path, whole: LaunchedFigures) -> None:
    run = LaunchedRun(cluster=slurm, root=root, name="pmix", settings=("slurm.mpi=pmix",))
    run.launch()
    run.finish()
    assert run.figures() == whole


@pytest.mark.parametrize("mpi", ["none", "pmix"])
def test_plain_srun_is_enough(slurm: SlurmOfHosts, root: Path, whole: LaunchedFigures, mpi: str) -> None:
    """Rank, world and meeting point come from SLURM, without a launcher of ours."""
    name = f"srun-{mpi}"
    settings = ["--set", f"run.name={name}", "--set", f"run.directory={root}/runs"]
    train = [sys.executable, "-m", "launcher", "train", str(root / "run.toml"), *settings]
    step = ["srun", f"--mpi={mpi}", "-N", str(RANKS), "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--immediate=60"]
    slurm.run(*step, *train, timeout=180, cwd=root, env={"OMP_NUM_THREADS": "1", **MPI_ENVIRONMENT})
    assert figures_of(LaunchedRun(cluster=slurm, root=root, name=name).directory) == whole


@pytest.mark.parametrize("name", SCENARIOS)
def test_after_a_fault_the_run_computes_the_same(
    slurm: SlurmOfHosts, root: Path, disk: Path, whole: LaunchedFigures, name: str
) -> None:
    scenario = SCENARIOS[name]
    run = _run_of(scenario, name, slurm, root, disk)
    job = run.launch()
    harm = scenario.inject(run)
    run.finish()
    # Every step once, with every sample.
    assert_equal_figures(run.figures(), whole, same_layout=scenario.same_layout)
    run.wait_until_nothing_is_left()
    state = run.state()
    assert state is not None
    failures = run.events("failure")
    if scenario.failures:
        assert state.restarts in scenario.restarts
    elif not scenario.requeues:
        assert failures == []
    if failures and scenario.failures:
        _assert_names_the_cause(failures[0], scenario, harm)
    requeues = [event["reason"] for event in run.events("requeue")]
    more = max(0, len(requeues) - len(scenario.requeues)) if scenario.repeats else 0
    assert requeues == [*scenario.requeues, *scenario.requeues[-1:] * more] or not scenario.requeues, requeues
    starts = len(run.events("launch"))
    assert starts >= scenario.starts
    assert slurm.job(job)["Restarts"] == str(starts - 1)
    for lost in run.events("rollback"):
        assert lost["lost_steps"] <= scenario.most_lost, lost


def _assert_names_the_cause(failure: dict[str, Any], scenario: Scenario, harm: Harm) -> None:
    assert failure["kind"] in scenario.failures, failure
    assert harm.host is None or failure["host"] == harm.host, (harm, failure)
    assert harm.rank is None or failure["rank"] == harm.rank, (harm, failure)
    assert scenario.signal is None or scenario.signal in failure["message"], failure
    assert not scenario.in_collective or failure["last_collective"], failure


def _run_of(scenario: Scenario, name: str, slurm: SlurmOfHosts, root: Path, disk: Path) -> LaunchedRun:
    return LaunchedRun(
        cluster=slurm,
        root=root,
        name=name.replace(" ", "-"),
        settings=scenario.settings,
        run_root=disk / "runs" if scenario.small_disk else None,
    )


def test_a_crash_loop_ends_with_its_cause(slurm: SlurmOfHosts, root: Path, whole: LaunchedFigures) -> None:
    run = LaunchedRun(cluster=slurm, root=root, name="crash-loop")
    run.launch()
    for attempt in range(1, 4):
        run.wait_until(lambda: 0 in run.ranks(), what="rank 0")
        run.ranks()[0].kill()
        run.wait_until(lambda number=attempt: len(run.events("failure")) == number, what="the failure")  # type: ignore[misc]
    state = run.wait_for_end()
    assert state.state == "failed"
    assert len(run.events("attempt")) == 3
    assert state.cause is not None
    assert "SIGKILL" in state.cause
    assert run.status()["cause"] == state.cause
    run.wait_until_nothing_is_left()


def test_a_supervisor_that_is_killed_is_told_within_seconds_and_the_same_command_continues(
    slurm: SlurmOfHosts, root: Path, whole: LaunchedFigures
) -> None:
    run = LaunchedRun(cluster=slurm, root=root, name="supervisor-killed")
    run.launch()
    run.wait_for_step(EVERY_STEPS + 2)
    run.supervisor().kill()
    killed = time.monotonic()
    while (status := run.status())["state"] != "failed":
        assert time.monotonic() - killed < 60.0, (status, run.account())
    seconds = int(re.search(r"not been heard of for (\d+) s, and job \d+ is gone", status["cause"])[1])  # type: ignore[index]
    assert seconds < 30
    saved = run.events("checkpoint")[-1]["step"]
    assert status["cause"].endswith(f"launch it again: it goes on from step {saved}")
    run.launch()
    run.finish()
    assert run.figures() == whole


def test_preflight_leaves_out_a_host_whose_link_is_slow(
    slurm: SlurmOfHosts, root: Path, whole: LaunchedFigures
) -> None:
    slow = slurm.names[1]
    slurm.set_rate(slow, 100.0)
    settings = ("launch.preflight.fabric=true", "slurm.nodes=5")
    run = LaunchedRun(cluster=slurm, root=root, name="slow-host", settings=settings)
    run.launch()
    run.finish()
    assert run.figures() == whole
    status = run.status()
    assert status["excluded_hosts"] == [slow]
    assert slow not in run.state().hosts  # type: ignore[union-attr]
    refused = run.events("preflight")[0]
    assert not refused["ok"]
    assert any(slow in sentence for sentence in refused["sentences"])


def test_a_wrong_configuration_never_reaches_the_queue(slurm: SlurmOfHosts, root: Path, whole: LaunchedFigures) -> None:
    for settings, said in (
        (("train.stepz=4",), "train.steps"),
        (("parallel.tp=3",), "parallel.tp"),
        (("slurm.partition=nowhere",), "nowhere"),
        (("launch.nodes=9",), "9"),
    ):
        run = LaunchedRun(cluster=slurm, root=root, name="wrong", settings=settings)
        done = run.mega("launch", str(root / "run.toml"), "--on", "slurm", "--json", *run._sets(), check=False)
        assert done.returncode == 2, (settings, done.stdout, done.stderr)
        assert said in json.loads(done.stdout)["error"] + " ".join(json.loads(done.stdout).get("problems", []))
        assert slurm.run("squeue", "--noheader").stdout == ""
        assert not run.directory.root.exists()


def test_cancel_saves_and_ends_for_good(slurm: SlurmOfHosts, root: Path, whole: LaunchedFigures) -> None:
    run = LaunchedRun(cluster=slurm, root=root, name="cancelled")
    run.launch()
    run.wait_for_step(EVERY_STEPS + 2)
    run.mega("cancel", str(run.directory.root))
    state = run.wait_for_end()
    assert state.state == "failed"
    assert state.cause is not None
    assert "cancelled" in state.cause
    saved = max(int(path.name.removeprefix("step-")) for path in run.directory.checkpoints.glob("step-*"))
    assert saved == len(run.figures())
    run.wait_until_nothing_is_left()
    # The same command continues.
    run.launch()
    run.finish()
    assert run.figures() == whole
