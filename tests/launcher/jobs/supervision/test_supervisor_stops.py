"""A supervisor that is told to stop: ranks save, and the job is queued again where the scheduler wants its hosts back."""

import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import RunError
from launcher.jobs.job_record import SupervisorState
from tests.launcher.jobs.made_up_hosts import MadeUpJob, is_running

# Trains until a stop signal comes, of which it tells; then saves and stops in good order.
_SAVES = """
arrived = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: arrived.append(signal.Signals(number).name))
mark("training")
while not arrived:
    time.sleep(0.01)
mark("told", arrived[0])
if rank == 0:
    checkpoint(7)
sys.exit(75)
"""


def _stopper(
    job: MadeUpJob, *numbers: int, marks: tuple[str, ...] = ("training-0-1",)
) -> Callable[[], Awaitable[None]]:
    async def stop() -> None:
        await job.wait_for(*marks)
        for number in numbers:
            os.kill(os.getpid(), number)

    return stop


@pytest.mark.parametrize(
    ("number", "arrives_as"),
    [
        (signal.SIGTERM, "SIGTERM"),
        (signal.SIGUSR1, "SIGUSR1"),
        (signal.SIGINT, "SIGINT"),
        (signal.SIGHUP, "SIGTERM"),
    ],
)
def test_ranks_save_and_the_job_ends_with_75(tmp_path: Path, number: signal.Signals, arrives_as: str) -> None:
    job = MadeUpJob(tmp_path, ["a"], _SAVES)
    job.backend.accepts_requeue = False
    end = job.supervise(_stopper(job, number))
    who = "stopped before its time limit (SIGUSR1)" if number == signal.SIGUSR1 else f"stopped by {number.name}"
    assert (end.exit_code, end.requeued) == (75, False)
    assert end.cause == f"{who}; saved at step 7: the same command continues"
    assert (job.state().state, job.state().cause, job.state().last_checkpoint) == ("failed", end.cause, 7)
    assert (job.root / "told-0-1").read_text() == arrives_as
    reason = "time_limit" if number == signal.SIGUSR1 else "signal"
    (asked,) = job.events("stop_asked")
    assert (asked["signal"], asked["reason"]) == (number.name, reason)
    assert len(job.events("attempt")) == 1


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGTERM, "preemption"), (signal.SIGUSR1, "time_limit")])
def test_the_job_is_queued_again_where_the_scheduler_wants_its_hosts(
    tmp_path: Path, number: signal.Signals, reason: str
) -> None:
    job = MadeUpJob(tmp_path, ["a"], _SAVES)
    job.backend.preempted = True
    end = job.supervise(_stopper(job, number))
    assert (end.exit_code, end.requeued) == (75, True)
    assert job.backend.requeues == [{"without": (), "reason": reason}]
    assert (job.state().state, job.state().requeues) == ("queued", 1)
    assert job.events("requeue")[0]["reason"] == reason
    assert job.said[-1] == f"{end.cause}; the job is queued again"


def test_a_cancelled_job_is_not_queued_again(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a"], _SAVES)
    job.backend.preempted = True

    async def cancel() -> None:
        await job.wait_for("training-0-1")
        job.folder.ask_to_cancel()
        os.kill(os.getpid(), signal.SIGTERM)

    end = job.supervise(cancel)
    assert (end.exit_code, end.requeued, job.backend.requeues) == (75, False, [])
    assert end.cause == "cancelled; saved at step 7: the same command continues"
    assert job.state().state == "failed"
    assert job.events("stop_asked")[0]["reason"] == "cancel"


@pytest.mark.parametrize("when", ["while ranks save", "while the scheduler does not answer"])
def test_a_job_that_is_cancelled_after_another_stop_is_not_queued_again(tmp_path: Path, when: str) -> None:
    job = MadeUpJob(tmp_path, ["a"], _SAVES.replace("if rank == 0", "wait_for('go')\nif rank == 0"))

    async def cancel() -> None:
        await job.wait_for("told-0-1")
        await job.until(lambda: bool(job.events("stop_asked")))
        if when == "while ranks save":
            job.folder.ask_to_cancel()
            os.kill(os.getpid(), signal.SIGTERM)
        (job.root / "go").touch()

    async def answer_late(*, without: object, reason: str) -> bool:
        job.folder.ask_to_cancel()
        raise RunError("slurmctld: timed out")

    job.backend.requeue = answer_late  # type: ignore[method-assign]
    end = job.supervise(_stopper(job, signal.SIGUSR1), cancel)
    assert (end.exit_code, end.requeued, job.events("requeue")) == (75, False, [])
    assert end.cause == job.state().cause == "cancelled; saved at step 7: the same command continues"
    assert (job.state().state, job.state().requeues) == ("failed", 0)


@pytest.mark.parametrize("is_restarted", [False, True], ids=["first start", "queued again"])
def test_a_job_that_was_cancelled_while_it_was_queued_does_not_begin(tmp_path: Path, is_restarted: bool) -> None:
    job = MadeUpJob(tmp_path, ["b"], "")
    if is_restarted:
        _left_by_an_earlier_start(job)
    job.folder.ask_to_cancel()
    end = job.supervise()
    assert (end.exit_code, job.state().state, job.backend.starts) == (75, "failed", [])
    assert end.cause == "cancelled; nothing was trained yet: the same command continues"


@pytest.mark.parametrize("state", ["failed", "finished"])
def test_a_job_that_had_ended_and_is_started_again_counts_anew(tmp_path: Path, state: str) -> None:
    job = MadeUpJob(tmp_path, ["b"], "if attempt < 7:\n    sys.exit(5)")
    _left_by_an_earlier_start(job, state=state, attempts_without_progress=3)
    job.folder.ask_to_cancel()
    assert job.supervise().exit_code == 0
    assert job.events("restart")[0]["reason"] == "the job was started again"
    assert len(job.events("attempt")) == 3
    assert not job.folder.is_cancelled()


def test_a_job_that_slurm_itself_queued_again_while_it_was_cancelled_does_not_begin(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["b"], "")
    job.backend.is_restart = True
    _left_by_an_earlier_start(job, state="failed", cause="cancelled while it waited")
    job.folder.ask_to_cancel()
    end = job.supervise()
    assert (end.exit_code, end.requeued, job.backend.starts) == (75, False, [])
    assert job.state().state == "failed"
    assert end.cause == job.state().cause == "cancelled; nothing was trained yet: the same command continues"


def test_a_failed_job_that_somebody_requeues_begins_again(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["b"], "")
    job.backend.is_restart = True
    _left_by_an_earlier_start(job, state="failed", attempts_without_progress=3)
    assert job.supervise().exit_code == 0


def test_a_scheduler_that_does_not_answer_is_asked_again(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a"], _SAVES)
    job.backend.preempted = True
    is_preempted, requeue, asked = job.backend.is_preempted, job.backend.requeue, []

    async def hear_late() -> bool:
        asked.append("is_preempted")
        if len(asked) < 3:
            raise RunError("slurmctld: timed out")
        return await is_preempted()

    async def queue_late(*, without: Sequence[str], reason: str) -> bool:
        asked.append("requeue")
        if len(asked) < 6:
            raise RunError("slurmctld: timed out")
        return await requeue(without=without, reason=reason)

    job.backend.is_preempted, job.backend.requeue = hear_late, queue_late  # type: ignore[method-assign]
    assert job.supervise(_stopper(job, signal.SIGTERM)).requeued
    assert asked == ["is_preempted"] * 3 + ["requeue"] * 3
    assert job.said.count("the scheduler does not answer and is asked again: slurmctld: timed out") == 2  # once each
    assert job.backend.requeues == [{"without": (), "reason": "preemption"}]


def test_a_scheduler_that_never_answers_ends_the_job(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a"], _SAVES)
    job.patience = replace(job.patience, scheduler=0.0)

    async def fail(*, without: Sequence[str], reason: str) -> bool:
        raise RunError("slurmctld: timed out")

    job.backend.requeue = fail  # type: ignore[method-assign]
    end = job.supervise(_stopper(job, signal.SIGUSR1))
    assert (end.exit_code, end.requeued, job.state().state, job.state().requeues) == (75, False, "failed", 0)
    assert "the scheduler does not answer: slurmctld: timed out" in job.said


def test_ranks_that_do_not_save_in_time_are_ended(tmp_path: Path) -> None:
    job = MadeUpJob(
        tmp_path,
        ["a"],
        "checkpoint(5)\nsignal.signal(signal.SIGTERM, lambda *_: mark('told'))\nmark('training')\nhang()",
        launch="save_seconds = 0.3",
    )
    end = job.supervise(_stopper(job, signal.SIGTERM))
    assert end.exit_code == 1
    assert end.cause == (
        "stopped by SIGTERM; ended before a checkpoint was saved; the same command continues from step 5"
    )
    assert not any(map(is_running, job.pids()))


def test_a_failure_while_ranks_save_is_told_and_the_job_is_queued_again_all_the_same(tmp_path: Path) -> None:
    job = MadeUpJob(
        tmp_path,
        ["a"],
        "signal.signal(signal.SIGUSR1, lambda *_: fail('the disk is full'))\nmark('training')\nhang()",
    )
    end = job.supervise(_stopper(job, signal.SIGUSR1))
    assert end.requeued
    assert end.cause == (
        "stopped before its time limit (SIGUSR1); rank 0 of 1 on a: the disk is full (before a step was recorded); "
        "the same command continues from step 0"
    )
    assert job.events("failure")[0]["kind"] == "exception"


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    script = (
        "on_stop(signal.SIGINT, lambda: mark('told'))\non_stop(signal.SIGTERM, lambda: None)\nmark('training')\nhang()"
    )
    job = MadeUpJob(tmp_path, ["a"], script)

    async def interrupt_twice() -> None:
        await job.wait_for("training-0-1")
        os.kill(os.getpid(), signal.SIGINT)
        await job.wait_for("told-0-1")
        os.kill(os.getpid(), signal.SIGINT)

    end = job.supervise(interrupt_twice)
    assert end.exit_code == 130
    assert "Ending at once. The last complete checkpoint stays." in job.said
    assert not any(map(is_running, job.pids()))


def test_ranks_that_somebody_else_has_stopped_end_the_job(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a"], _SAVES)

    async def stop_rank() -> None:
        await job.wait_for("training-0-1")
        os.kill(job.pid(0), signal.SIGTERM)

    end = job.supervise(stop_rank)
    assert (end.exit_code, end.requeued) == (75, False)
    assert end.cause == "stopped by a signal to its ranks; saved at step 7: the same command continues"


def test_ranks_that_the_scheduler_itself_has_stopped_are_queued_again(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a"], _SAVES)
    job.backend.preempted = True

    async def stop_rank() -> None:
        await job.wait_for("training-0-1")
        os.kill(job.pid(0), signal.SIGTERM)

    assert job.supervise(stop_rank).requeued
    assert job.backend.requeues == [{"without": (), "reason": "preemption"}]


def test_a_stop_is_heard_while_hosts_are_waited_for(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a", "b"], "mark('training')\nhang()", launch="nodes = 2")

    async def lose_host_and_stop() -> None:
        await job.wait_for("training-0-1", "training-1-1")
        job.backend.there.remove("b")
        os.kill(job.pid(1), signal.SIGKILL)
        await job.until(lambda: any("waiting up to" in said for said in job.said))
        os.kill(os.getpid(), signal.SIGTERM)

    end = job.supervise(lose_host_and_stop)
    assert end.exit_code == 75
    assert end.cause == "stopped by SIGTERM; nothing was trained yet: the same command continues"


def test_a_stop_is_heard_while_agents_are_waited_for(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a", "b"], "", launch="nodes = 2")
    job.backend.absent = {"b"}
    end = job.supervise(_stopper(job, signal.SIGTERM, marks=("came-a-1",)))
    assert (end.exit_code, job.events("ranks_started"), job.pids()) == (75, [], [])


def test_a_stop_is_heard_during_the_delay_before_an_attempt(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a"], "checkpoint(3)\nsys.exit(5)", launch="restart_delay_seconds = 600.0")

    async def stop() -> None:
        await job.until(lambda: any(said.endswith("going on from step 3 in 600 s") for said in job.said))
        os.kill(os.getpid(), signal.SIGTERM)

    end = job.supervise(stop)
    assert (end.exit_code, len(job.events("attempt"))) == (75, 1)
    assert end.cause == "stopped by SIGTERM; saved at step 3: the same command continues"


def _left_by_an_earlier_start(job: MadeUpJob, **changes: object) -> None:
    state = SupervisorState(
        state="queued",
        host="n7",
        pid=1,
        updated=0.0,
        attempt=4,
        restarts=3,
        requeues=2,
        attempts_without_progress=1,
        last_checkpoint=0,
        cause="preempted",
        excluded_hosts={"a": "it is slow"},
    )
    job.folder.write_state(replace(state, **changes))
    for number in range(1, 5):
        (job.run.logs / f"attempt-{number}").mkdir(parents=True)


def test_a_later_start_of_the_job_goes_on_counting_and_leaves_excluded_hosts_out(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a", "b"], "if attempt == 5:\n    sys.exit(5)\nif attempt == 6:\n    checkpoint(9)")
    _left_by_an_earlier_start(job)
    assert job.supervise().exit_code == 0
    assert job.backend.starts == [("b",), ("b",)]
    assert [event["reason"] for event in job.events("restart")] == [
        "preempted",
        "rank 0 of 1 on b ended with exit code 5 (before a step was recorded)",
    ]
    state = job.state()
    assert (state.attempt, state.restarts, state.requeues, state.state) == (6, 5, 2, "finished")
    assert state.excluded_hosts == {"a": "it is slow"}


def test_a_job_that_was_queued_again_before_its_first_attempt_has_not_restarted(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["b"], "")
    _left_by_an_earlier_start(job, attempt=0, restarts=0, attempts_without_progress=0)
    assert job.supervise().exit_code == 0
    assert (job.state().restarts, job.state().requeues, job.events("restart")) == (0, 2, [])


def test_attempts_without_progress_are_counted_over_starts_of_the_job(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["b"], "sys.exit(5)")
    _left_by_an_earlier_start(job, attempts_without_progress=2)
    end = job.supervise()
    assert end.cause is not None
    assert end.cause.endswith("; 3 attempts in a row without a new checkpoint")
    assert len(job.events("attempt")) == 1


def test_a_job_that_saves_nothing_before_its_time_is_over_again_and_again_gives_up(tmp_path: Path) -> None:
    script = "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\nmark('training')\nhang()"
    job = MadeUpJob(tmp_path, ["b"], script)
    _left_by_an_earlier_start(job, attempts_without_progress=1)
    assert job.supervise(_stopper(job, signal.SIGUSR1, marks=("training-0-5",))).requeued
    assert job.state().attempts_without_progress == 2
    end = job.supervise(_stopper(job, signal.SIGUSR1, marks=("training-0-6",)))
    assert (end.exit_code, end.requeued, job.state().state) == (1, False, "failed")
    assert end.cause is not None
    assert end.cause.endswith("; 3 attempts in a row without a new checkpoint")
    assert len(job.events("give_up")) == 1


def test_preemption_is_no_attempt_without_progress(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["b"], "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nmark('on')\nhang()")
    _left_by_an_earlier_start(job, attempts_without_progress=2)
    job.backend.preempted = True
    assert job.supervise(_stopper(job, signal.SIGTERM, marks=("on-0-5",))).requeued
    assert job.state().attempts_without_progress == 2


def test_a_supervisor_that_was_lost_in_an_attempt_counts_as_its_failure(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["b"], "")
    _left_by_an_earlier_start(job, state="running", hosts=("a", "b"), attempts_without_progress=2)
    end = job.supervise()
    assert end.exit_code == 1
    assert end.cause == (
        "the supervisor of attempt 4 was lost, on host n7; 3 attempts in a row without a new checkpoint"
    )
    assert job.backend.starts == []
    assert job.events("failure") == []  # for how long nobody wanted it, nobody knows


def test_a_lost_supervisor_that_had_made_progress_is_no_reason_to_give_up(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["b"], "")
    _left_by_an_earlier_start(job, state="running", hosts=("b",), attempts_without_progress=2)
    folder = job.run.checkpoints / "step-00000009"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(
        '{"version": 1, "step": 9, "world_size": 1, "saved_at": 1.0, "metadata": {}, "files": {}}'
    )
    assert job.supervise().exit_code == 0
    assert job.events("restart")[0]["reason"] == "the supervisor of attempt 4 was lost, on host n7"
