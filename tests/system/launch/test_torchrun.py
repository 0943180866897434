"""`mega launch --on torchrun` on two hosts: trains as on one, and goes on as if nothing was after whatever is killed."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from launcher.goodput import read_ledger
from tests.megamodel.train.jobs import write_corpus
from tests.requirements import require
from tests.system.launch.hosts import LaunchHosts
from tests.system.launch.launched import Launched
from tests.system.runs import Run
from tests.system.test_kill import CONFIG

STEPS = 100
_LAUNCH = """
[launch]
nodes = 2
preflight.enabled = false
restart_delay_seconds = 0.1
lost_host_seconds = 6
end_hangs_after_seconds = 3
"""
_DISTURBED_AT = 20
"""By then two checkpoints are there, and steps after the second."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[LaunchHosts]:
    require("netns")
    with LaunchHosts(2) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`mega train --ranks 2`."""
    root = tmp_path_factory.mktemp("torchrun")
    write_corpus(root / "corpus")
    (root / "run.toml").write_text(CONFIG.format(root=root, steps=STEPS) + _LAUNCH)
    whole = Run(root=root, name="whole", config=root / "run.toml", ranks=2)
    whole.finish()
    assert [step for step, *_ in whole.figures()] == list(range(1, STEPS + 1))
    return whole


@pytest.fixture
def run(hosts: LaunchHosts, undisturbed: Run, request: pytest.FixtureRequest) -> Launched:
    return Launched(hosts=hosts, root=undisturbed.root, name=request.node.name.removeprefix("test_"))


def train_until_disturbed(run: Launched) -> None:
    run.wait_until(lambda: len(run.figures()) >= _DISTURBED_AT)


def finishes_as_if_nothing_was(run: Launched, undisturbed: Run) -> None:
    assert run.end() == {"h0": 0, "h1": 0}, run.account()
    assert run.figures() == undisturbed.figures()
    state = run.state()
    assert state is not None
    assert state.state == "finished"


@pytest.mark.slow
def test_two_hosts_train_as_two_ranks_on_one_also_when_stopped_and_started_again(
    run: Launched, undisturbed: Run
) -> None:
    run.settings = ("launch.preflight.enabled=true",)
    with run.started():
        train_until_disturbed(run)
        run.nodes["h1"].send_signal(signal.SIGTERM)
        assert run.end() == {"h0": 75, "h1": 75}, run.account()
        saved = run.events("checkpoint")[-1]["step"]
        assert saved == run.figures()[-1][0] < STEPS
        for host in run.nodes:
            run.start(host)
        finishes_as_if_nothing_was(run, undisturbed)
        assert [event["step"] for event in run.events("resume")] == [saved]
        assert [(each["hosts"], each["num_ranks"]) for each in run.events("attempt")] == [(["h0", "h1"], 2)] * 2
        assert run.said("h1").count("h0 leads the job") == 2
        preflights = [(each["attempt"], each["ok"], each["bad_hosts"]) for each in run.events("preflight")]
        assert preflights == [(1, True, []), (2, True, [])], run.events("preflight")


@pytest.mark.slow
def test_a_rank_is_killed_then_torchrun_s_agent_then_a_rank_hangs(
    run: Launched, undisturbed: Run, hosts: LaunchHosts
) -> None:
    with run.started():
        train_until_disturbed(run)
        (rank,) = run.ranks("h1")
        rank.kill()
        run.wait_until(lambda: len(run.events("resume")) == 1 and len(run.figures()) >= 2 * _DISTURBED_AT)
        (rank,) = run.ranks("h1")
        (torchrun,) = hosts.processes("h1", "launcher.jobs.torchrun.process")
        assert rank.ppid() == torchrun.pid
        torchrun.kill()
        rank.wait(timeout=60.0)
        run.wait_until(lambda: len(run.events("resume")) == 2 and len(run.figures()) >= 3 * _DISTURBED_AT)
        (rank,) = run.ranks("h1")
        rank.suspend()
        finishes_as_if_nothing_was(run, undisturbed)
        killed, lost, hung = run.events("failure")
        assert [(each["rank"], each["host"]) for each in (killed, lost, hung)] == [(1, "h1")] * 3
        assert killed["kind"] == "signal"
        assert "SIGKILL" in killed["message"]
        assert "torchrun's agent was killed by SIGKILL" in lost["message"]
        assert hung["kind"] == "hang"


@pytest.mark.slow
def test_loss_of_a_host_that_comes_back(run: Launched, undisturbed: Run, hosts: LaunchHosts) -> None:
    with run.started():
        train_until_disturbed(run)
        hosts.kill("h1")
        run.wait_until(lambda: bool(run.events("wait_for_hosts")))
        hosts.revive("h1")
        run.start("h1")
        finishes_as_if_nothing_was(run, undisturbed)
        (failure,) = run.events("failure")
        assert (failure["kind"], failure["host"]) == ("host_lost", "h1")


@pytest.mark.slow
def test_loss_of_the_host_that_leads_where_one_is_enough(run: Launched, undisturbed: Run, hosts: LaunchHosts) -> None:
    run.settings = ("launch.min_nodes=1",)
    with run.started():
        train_until_disturbed(run)
        hosts.kill("h0")
        run.wait_until(lambda: "h1 leads the job" in run.said("h1"))
        assert not run.ranks("h1")
        run.wait_until(lambda: len(run.events("attempt")) == 2)
        hosts.revive("h0")
        run.start("h0")
        assert run.end() == {"h0": 0, "h1": 0}, run.account()
        assert [each["hosts"] for each in run.events("attempt")] == [["h0", "h1"], ["h1"]]
        assert "h1 leads the job" in run.said("h0")
        state = run.state()
        assert state is not None
        assert (state.state, state.host, state.restarts) == ("finished", "h1", 1)
        (failure,) = run.events("failure")
        assert (failure["kind"], failure["host"], failure["attempt"]) == ("host_lost", "h0", 1)
        ledger = read_ledger(run.directory, now=None)
        assert ledger is not None
        assert ledger.spent["stopped"] == 0
        assert ledger.spent["restarts"] >= 6e6  # for so long h1 hears nothing before it leads
    figures = undisturbed.figures()
    assert [step for step, *_ in run.figures()] == [step for step, *_ in figures]
    for (_, *mine), (_, *theirs) in zip(run.figures(), figures):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_a_job_that_is_cancelled_at_once_ends_on_all_hosts(run: Launched) -> None:
    with run.started():
        train_until_disturbed(run)
        assert run.cancel_now("h0") == 0, run.account()
        assert run.end() == {"h0": -signal.SIGKILL, "h1": 75}, run.account()
        state = run.state()
        assert state is not None
        assert (state.state, state.cause) == ("failed", "cancelled at once")
        assert len(run.events("launch")) == 1
        assert "h1 leads the job" not in run.said("h1")


@pytest.mark.slow
def test_kill_9_of_mega_launch_on_either_host(run: Launched, undisturbed: Run) -> None:
    with run.started():
        train_until_disturbed(run)
        for number, host in enumerate(("h1", "h0"), start=1):
            ranks = run.ranks(host)
            run.nodes[host].kill()
            for rank in ranks:
                rank.wait(timeout=60.0)
            run.start(host)
            done = (number + 1) * _DISTURBED_AT
            run.wait_until(lambda: len(run.events("resume")) == number and len(run.figures()) >= done)  # noqa: B023
        finishes_as_if_nothing_was(run, undisturbed)
