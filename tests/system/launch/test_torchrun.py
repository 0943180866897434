"""`mega launch --on torchrun` on two hosts: trains as on one, and goes on as if nothing was after whatever is killed."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

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
def test_two_hosts_train_as_two_ranks_on_one(run: Launched, undisturbed: Run) -> None:
    with run.started():
        finishes_as_if_nothing_was(run, undisturbed)
        assert "h0 leads the job" in run.said("h1")
        (attempt,) = run.events("attempt")
        assert (attempt["hosts"], attempt["num_ranks"]) == (["h0", "h1"], 2)


@pytest.mark.slow
def test_kill_9_of_a_rank_and_of_torchrun_s_agent(run: Launched, undisturbed: Run, hosts: LaunchHosts) -> None:
    with run.started():
        train_until_disturbed(run)
        (rank,) = run.ranks("h1")
        rank.kill()
        run.wait_until(lambda: bool(run.events("resume")) and len(run.figures()) >= 2 * _DISTURBED_AT)
        (rank,) = run.ranks("h1")
        (torchrun,) = hosts.processes("h1", "launcher.jobs.torchrun.process")
        assert rank.ppid() == torchrun.pid
        torchrun.kill()
        rank.wait(timeout=10.0)
        finishes_as_if_nothing_was(run, undisturbed)
        killed, lost = run.events("failure")
        assert (killed["kind"], killed["rank"], killed["host"]) == ("signal", 1, "h1")
        assert "SIGKILL" in killed["message"]
        assert "torchrun's agent was killed by SIGKILL" in lost["message"]


@pytest.mark.slow
def test_a_rank_that_hangs(run: Launched, undisturbed: Run) -> None:
    with run.started():
        train_until_disturbed(run)
        (rank,) = run.ranks("h1")
        rank.suspend()
        finishes_as_if_nothing_was(run, undisturbed)
        (failure,) = run.events("failure")
        assert (failure["kind"], failure["rank"], failure["host"]) == ("hang", 1, "h1")


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
def test_loss_of_the_host_that_leads(run: Launched, undisturbed: Run, hosts: LaunchHosts) -> None:
    with run.started():
        train_until_disturbed(run)
        hosts.kill("h0")
        run.wait_until(lambda: "h1 leads the job" in run.said("h1"))
        assert not run.ranks("h1")
        hosts.revive("h0")
        run.start("h0")
        finishes_as_if_nothing_was(run, undisturbed)
        assert "h1 leads the job" in run.said("h0")
        state = run.state()
        assert state is not None
        assert (state.host, state.restarts) == ("h1", 1)


@pytest.mark.slow
def test_kill_9_of_mega_launch_on_either_host(run: Launched, undisturbed: Run, hosts: LaunchHosts) -> None:
    with run.started():
        train_until_disturbed(run)
        for host in ("h1", "h0"):
            done = len(run.figures())
            ranks = run.ranks(host)
            run.nodes[host].kill()
            for rank in ranks:
                rank.wait(timeout=20.0)
            run.start(host)
            run.wait_until(lambda done=done: len(run.events("attempt")) > 1 and len(run.figures()) > done)
        finishes_as_if_nothing_was(run, undisturbed)


@pytest.mark.slow
def test_a_stop_signal_on_any_host_saves_and_the_same_command_continues(run: Launched, undisturbed: Run) -> None:
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
