"""A supervisor and its job: real agents, real ranks, hosts that are but names. What it does when something fails."""

import os
import re
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from launcher.errors import RunError
from launcher.jobs.job_record import JobRecord
from launcher.jobs.supervision import ranks_watch
from tests.launcher.jobs.made_up_hosts import MadeUpJob, is_running

# Ranks wait for one another as in a collective: when one is gone, the others say that they have lost it.
_TOGETHER = """
def alive(other):
    path = run / f"pid-{other}-{attempt}"
    if not path.exists():
        return True
    try:
        return Path("/proc/" + path.read_text() + "/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
def train_until_a_peer_is_lost():
    mark("training")
    while all(alive(other) for other in range(world)):
        time.sleep(0.01)
    lose_peer()
"""


def test_a_run_that_goes_well_is_told_from_launch_to_done(tmp_path: Path) -> None:
    job = MadeUpJob(
        tmp_path,
        ["a", "b"],
        """
        print("hello from rank", rank, flush=True)
        if rank == 0:
            (logs / "result.json").write_text('{"steps": 4}')
            checkpoint(4)
        """,
        launch="nodes = 2",
        ranks_per_host=2,
    )
    end = job.supervise()
    assert (end.exit_code, end.cause, end.result, end.requeued) == (0, None, {"steps": 4}, False)
    state = job.state()
    assert (state.state, state.attempt, state.restarts, state.last_checkpoint) == ("finished", 1, 0, 4)
    assert (state.hosts, state.cause, state.pid) == ((), None, os.getpid())
    names = [event["event"] for name in ("launch", "attempt", "ranks_started", "done") for event in job.events(name)]
    assert names == ["launch", "attempt", "ranks_started", "done"]
    (attempt,) = job.events("attempt")
    assert (attempt["hosts"], attempt["num_ranks"], attempt["restart"]) == (["a", "b"], 4, False)
    assert all("hello from rank" in line for line in job.shown)
    assert (job.root / "logs" / "attempt-1" / "job.log").read_text().splitlines() == job.shown
    assert job.said[0] == f"attempt 1: 4 ranks on a, b; logs: {job.root / 'logs' / 'attempt-1'}"
    assert job.said[-1] == "the run has finished; its newest checkpoint is of step 4"


def test_a_launch_is_told_with_its_job_and_when_that_was_submitted(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a"], "")
    job.folder.write_record(JobRecord(backend="slurm", job_id="7", submitted=1000.5, submitted_from="login", nodes=1))
    assert job.supervise().exit_code == 0
    assert [(event["job_id"], event["submitted"]) for event in job.events("launch")] == [("7", 1000.5)]


def test_a_terminal_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a"], "print('hello', flush=True)\nif attempt == 1:\n    sys.exit(5)")

    class Gone(list[str]):
        def append(self, text: str) -> None:
            raise BrokenPipeError

    job.said, job.shown = Gone(), Gone()
    assert job.supervise().exit_code == 0
    assert job.state().restarts == 1


def test_a_full_disk_ends_nothing(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a"], "mark('ran')\nif attempt == 1:\n    sys.exit(5)")
    (job.folder.root / f"state.{os.getpid()}.partial").symlink_to("/dev/full")
    job.run.events.symlink_to("/dev/full")

    class Full(list[str]):
        def append(self, text: str) -> None:
            with Path("/dev/full").open("w") as file:
                file.write(text)

    job.said, job.shown = Full(), Full()
    job.backend.before_start = lambda number: (job.root / "logs" / f"attempt-{number}" / "rank-0.log").symlink_to(
        "/dev/full"
    )
    assert job.supervise().exit_code == 0
    assert (job.root / "ran-0-2").exists()
    assert job.folder.read_state() is None


def test_after_a_kill_the_run_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    job = MadeUpJob(
        tmp_path,
        ["a", "b"],
        _TOGETHER
        + """
if attempt == 2:
    finish()
if rank == 0:
    step(39); step(40); checkpoint(40); step(41)
mark("ready")
if rank == 1:
    wait_for("ready-0-1")
    os.kill(os.getpid(), signal.SIGKILL)
train_until_a_peer_is_lost()
""",
        launch="nodes = 2",
    )
    end = job.supervise()
    assert end.exit_code == 0
    cause = "rank 1 of 2 on b was killed by SIGKILL; the kernel does this when memory runs out (after step 41)"
    (failure,) = job.events("failure")
    assert {key: failure[key] for key in ("attempt", "kind", "rank", "host", "message", "step")} == {
        "attempt": 1,
        "kind": "signal",
        "rank": 1,
        "host": "b",
        "message": cause,
        "step": 41,
    }
    log = job.root / "logs" / "attempt-1" / "rank-1.log"
    assert f"{cause}; its log: {log}; going on from step 40" in job.said
    (restart,) = job.events("restart")
    assert (restart["attempt"], restart["reason"]) == (2, cause)
    assert [event["restart"] for event in job.events("attempt")] == [False, True]
    assert (job.state().restarts, job.state().attempts_without_progress) == (1, 0)
    assert not any(map(is_running, job.pids()))


def test_the_first_cause_is_told_though_its_effects_came_first(tmp_path: Path) -> None:
    job = MadeUpJob(
        tmp_path,
        ["a", "b", "c"],
        _TOGETHER
        + """
if rank > 0:
    while alive(0):
        time.sleep(0.01)
if rank == 2:
    fail("the disk is full")
lose_peer()
""",
        launch="nodes = 3\nmax_attempts_without_progress = 1",
    )
    end = job.supervise()
    assert end.exit_code == 1
    cause = "rank 2 of 3 on c: the disk is full (before a step was recorded); 1 attempt without a new checkpoint"
    assert end.cause == job.state().cause == cause
    assert job.state().state == "failed"
    assert job.events("give_up")[0]["cause"] == cause
    assert not any(map(is_running, job.pids()))


def test_a_crash_loop_ends_after_three_attempts_without_progress(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a"], "if attempt == 2:\n    checkpoint(10)\nprint('bad luck', flush=True)\nsys.exit(5)")
    end = job.supervise()
    # The second attempt made progress; three after it did not.
    assert len(job.events("attempt")) == 5
    assert end.exit_code == 1
    assert end.cause == (
        "rank 0 of 1 on a ended with exit code 5: bad luck (before a step was recorded); "
        "3 attempts in a row without a new checkpoint"
    )
    assert (job.state().restarts, job.state().last_checkpoint) == (4, 10)


@pytest.mark.parametrize("code", [2, 3])
def test_what_cannot_heal_is_not_tried_again(tmp_path: Path, code: int) -> None:
    job = MadeUpJob(tmp_path, ["a"], f"fail('data.path: no such folder', {code})")
    end = job.supervise()
    assert (end.exit_code, len(job.events("attempt"))) == (code, 1)
    assert end.cause == "rank 0 of 1 on a: data.path: no such folder (before a step was recorded)"


def test_a_traceback_is_shown(tmp_path: Path) -> None:
    job = MadeUpJob(
        tmp_path,
        ["a"],
        """
        from launcher.failure_record import record_failure
        try:
            {}["nothing"]
        except KeyError as error:
            path = Path(os.environ["MEGA_FAILURE_FILE"])
            record_failure(path, error, message="KeyError: nothing", exit_code=1, with_traceback=True)
        sys.exit(1)
        """,
        launch="max_attempts_without_progress = 1",
    )
    assert job.supervise().exit_code == 1
    assert any(said.startswith("Traceback (most recent call last):") and "KeyError" in said for said in job.said)
    assert job.events("failure")[0]["kind"] == "exception"


def test_a_lost_agent_is_a_lost_host_and_leaves_no_rank(tmp_path: Path) -> None:
    job = MadeUpJob(
        tmp_path, ["a", "b"], _TOGETHER + "if attempt == 1:\n    train_until_a_peer_is_lost()", launch="nodes = 2"
    )

    async def kill_agent() -> None:
        await job.wait_for("training-0-1", "training-1-1")
        job.backend.agents["b"].signal(signal.SIGKILL)

    assert job.supervise(kill_agent).exit_code == 0
    (failure,) = job.events("failure")
    assert (failure["kind"], failure["host"], failure["rank"]) == ("host_lost", "b", None)
    assert failure["message"] == "host b was lost: its agent's connection ended (before a step was recorded)"
    assert job.backend.starts == [("a", "b"), ("a", "b")]
    assert not any(map(is_running, job.pids()))


_SILENT = "min_nodes = 1\nnodes = 2\nlost_host_seconds = 3.0"


def _stop_agent_of_b(job: MadeUpJob) -> Callable[[], Awaitable[None]]:
    async def stop_agent() -> None:
        await job.wait_for("training-0-1", "training-1-1")
        job.backend.agents["b"].signal(signal.SIGSTOP)

    return stop_agent


def test_a_silent_host_is_lost_and_left_out_where_others_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_watch, "_ISOLATED_SECONDS", 0.0)
    job = MadeUpJob(tmp_path, ["a", "b"], "if attempt == 1:\n    mark('training')\n    hang()", launch=_SILENT)
    assert job.supervise(_stop_agent_of_b(job)).exit_code == 0
    (failure,) = job.events("failure")
    assert failure["kind"] == "host_lost"
    assert failure["message"].startswith("host b was lost: nothing heard for 3 s")
    assert job.backend.starts == [("a", "b"), ("a",)]
    assert not any(map(is_running, job.pids()))


def test_no_attempt_begins_while_ranks_out_of_reach_may_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_watch, "_ISOLATED_SECONDS", 6000.0)
    job = MadeUpJob(tmp_path, ["a", "b"], "mark('training')\nhang()", launch=_SILENT)

    async def stop() -> None:
        await job.until(
            lambda: any(re.search(r"; going on from step 0 in [56]\d+(\.\d)? s$", said) for said in job.said)
        )
        os.kill(os.getpid(), signal.SIGTERM)

    assert job.supervise(_stop_agent_of_b(job), stop).exit_code == 75
    assert len(job.events("attempt")) == 1


def test_a_host_that_never_comes_is_named_and_a_spare_takes_its_place(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a", "b", "c"], "", launch="nodes = 2\nstart_timeout_seconds = 0.5")
    job.backend.absent = {"b"}
    assert job.supervise().exit_code == 0
    (failure,) = job.events("failure")
    assert (failure["kind"], failure["host"]) == ("never_came", "b")
    assert failure["message"] == "host b did not come within 0.5 s"
    assert job.backend.starts == [("a", "b"), ("a", "c")]


def test_without_a_spare_a_host_that_did_not_come_is_tried_again(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a", "b"], "", launch="nodes = 2\nstart_timeout_seconds = 0.5")
    job.backend.absent = {"b"}

    def bring_back(start: int) -> None:
        if start == 2:
            job.backend.absent = set()

    job.backend.before_start = bring_back
    assert job.supervise().exit_code == 0
    assert job.backend.starts == [("a", "b"), ("a", "b")]


def test_a_host_that_is_lost_twice_in_a_row_is_excluded(tmp_path: Path) -> None:
    # Attempt 2 is without b, and fails for another reason; attempt 3 tries b again.
    job = MadeUpJob(
        tmp_path,
        ["a", "b", "c"],
        "if attempt == 2:\n    if host == 'c':\n        os.kill(os.getpid(), signal.SIGKILL)\n    hang()",
        launch="nodes = 2\nstart_timeout_seconds = 0.5\nmax_attempts_without_progress = 9",
    )
    job.backend.absent = {"b"}
    assert job.supervise().exit_code == 0
    assert job.backend.starts == [("a", "b"), ("a", "c"), ("a", "b"), ("a", "c")]
    (exclude,) = job.events("exclude")
    assert (exclude["host"], exclude["reason"]) == ("b", "was lost 2 times in a row")
    assert job.state().excluded_hosts == {"b": "was lost 2 times in a row"}


def test_fewer_hosts_go_on_with_the_largest_layout_that_is_possible(tmp_path: Path) -> None:
    # A global batch of 12 rows divides among 4 and 3 ranks of one host each, but not among 5.
    job = MadeUpJob(
        tmp_path,
        ["a", "b", "c", "d", "e", "f"],
        "if attempt == 1:\n    mark('training')\n    hang()",
        launch="nodes = 6\nmin_nodes = 2",
    )

    async def lose_host() -> None:
        await job.wait_for(*(f"training-{rank}-1" for rank in range(6)))
        job.backend.there.remove("d")
        os.kill(job.pid(3), signal.SIGKILL)

    assert job.supervise(lose_host).exit_code == 0
    assert job.backend.starts == [tuple("abcdef"), tuple("abce")]
    assert [event["num_ranks"] for event in job.events("attempt")] == [6, 4]


def test_too_few_hosts_are_waited_for(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a", "b"], "if attempt == 1:\n    mark('training')\n    hang()", launch="nodes = 2")

    async def lose_host_for_a_while() -> None:
        await job.wait_for("training-0-1", "training-1-1")
        job.backend.there.remove("b")
        os.kill(job.pid(1), signal.SIGKILL)
        told = "1 host is there, and 2 needed (launch.nodes); not there: b: waiting up to 300 s for others"
        await job.until(lambda: told in job.said)
        job.backend.there.append("b")

    assert job.supervise(lose_host_for_a_while).exit_code == 0
    (wait,) = job.events("wait_for_hosts")
    assert (wait["have"], wait["need"]) == (1, 2)
    assert job.backend.starts == [("a", "b"), ("a", "b")]


def test_where_hosts_do_not_come_back_the_job_is_queued_again(tmp_path: Path) -> None:
    job = MadeUpJob(
        tmp_path,
        ["a", "b"],
        "mark('training')\nhang()",
        launch="nodes = 2\nwait_for_hosts_seconds = 0.2",
    )

    async def lose_host() -> None:
        await job.wait_for("training-0-1", "training-1-1")
        job.backend.there.remove("b")
        os.kill(job.pid(1), signal.SIGKILL)

    end = job.supervise(lose_host)
    assert (end.exit_code, end.requeued) == (75, True)
    assert job.backend.requeues == [{"without": (), "reason": "hosts"}]
    assert end.cause is not None
    lack = "1 host is left, and 2 needed (launch.nodes); not there: b"
    assert end.cause.startswith(f"{lack}; before that: rank 1 of 2 on b was killed by SIGKILL")
    assert (job.state().state, job.state().requeues, job.state().cause) == ("queued", 1, end.cause)
    assert job.events("requeue")[0]["reason"] == "hosts"


def test_a_host_that_cannot_come_back_is_not_waited_for(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a", "b"], "mark('training')\nhang()", launch="nodes = 2")

    async def lose_host() -> None:
        await job.wait_for("training-0-1", "training-1-1")
        job.backend.there.remove("b")
        job.backend.possible.remove("b")
        os.kill(job.pid(1), signal.SIGKILL)

    assert job.supervise(lose_host).requeued
    assert job.events("wait_for_hosts") == []


def test_hosts_of_which_nobody_knows_are_waited_for(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a"], "")
    hosts, asked = job.backend.hosts, []

    async def fail() -> Sequence[str]:
        asked.append("now")
        raise RunError("slurmctld: timed out")

    async def answer_late() -> Sequence[str]:
        return await (hosts() if len(asked) > 3 else fail())

    job.backend.hosts, job.backend.possible_hosts = answer_late, fail  # type: ignore[method-assign]
    assert job.supervise().exit_code == 0
    assert len(job.events("wait_for_hosts")) == 1


def test_too_few_hosts_from_the_beginning_are_not_waited_for(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a"], "", launch="nodes = 3")
    job.backend.accepts_requeue = False
    end = job.supervise()
    assert (end.exit_code, end.cause) == (1, "1 host is left, and 3 needed (launch.nodes)")
    assert (job.state().state, job.state().requeues) == ("failed", 0)
    assert job.backend.starts == []
