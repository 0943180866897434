"""What a run's state is, by what its folder and the queue tell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from launcher.jobs.inspection.status import RunStatus, run_statuses
from launcher.jobs.slurm.squeue import QueuedJob
from launcher.run_lock import locked_run
from megamodel.train.run_directory import RunDirectory
from tests.launcher.jobs.runs import NOW, MadeRun

PENDING = {"17": QueuedJob(state="PENDING", reason="Resources")}
RUNNING = {"17": QueuedJob(state="RUNNING", reason="")}


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path / "runs" / "x")


def refuse(*said: object) -> None:
    raise AssertionError(said)


def nobody_asks(job_ids: Sequence[str]) -> None:
    raise AssertionError(job_ids)


def seen(run: MadeRun, queue: Mapping[str, QueuedJob] | None = None, *, asks: bool = True) -> RunStatus:
    """Its status; where it `asks` the queue, that answers `queue`."""
    asked: list[Sequence[str]] = []

    def ask(job_ids: Sequence[str]) -> Mapping[str, QueuedJob] | None:
        asked.append(job_ids)
        return queue

    (status,) = run_statuses([run.directory], now=NOW, ask_queue=ask)
    assert bool(asked) == asks
    return status


def plain(run: MadeRun) -> RunStatus:
    return seen(run, asks=False)


def test_a_run_of_mega_train_that_goes_on(run: MadeRun) -> None:
    run.event("begin", ago=100, began=NOW - 110, host="laptop", num_ranks=1)
    run.event("start", ago=99, step=0)
    run.steps(1, 30, ago=1.0)
    with locked_run(run.directory.root, say=refuse):
        status = plain(run)
    assert (status.state, status.cause, status.step, status.total_steps) == ("running", None, 30, 100)
    assert status.loss == pytest.approx(4.7)
    assert status.tokens_per_s == pytest.approx(1016, abs=2)  # the median of those that did not compile
    assert status.mfu == 0.4
    assert status.eta_s == pytest.approx(70 * 2.0 - 1.0)
    assert (status.restarts, status.attempt, status.backend, status.job_id) == (0, 1, None, None)
    assert (status.hosts, status.excluded_hosts) == (("laptop",), ())
    assert (status.last_event, status.last_event_age_s) == ("training from step 0", 99.0)


@pytest.mark.parametrize("last", ["end", "finished"])
def test_a_run_of_mega_train_that_is_done(run: MadeRun, last: str) -> None:
    run.event("start", ago=99, step=0)
    run.steps(1, 100, ago=10)
    run.event("end", ago=9, step=100)
    if last == "finished":
        run.event("finished", ago=5, step=100)
    status = plain(run)
    assert (status.state, status.cause, status.step, status.eta_s) == ("finished", None, 100, None)


def test_a_run_of_mega_train_that_was_stopped(run: MadeRun) -> None:
    run.event("start", ago=99, step=0)
    run.steps(1, 40, ago=10)
    run.event("stop", ago=9, step=40, signal="SIGTERM", message="stopped by SIGTERM after step 40; saved")
    status = plain(run)
    assert (status.state, status.cause) == ("failed", "stopped by SIGTERM after step 40; saved")
    assert status.has_ended


def test_a_run_of_mega_train_that_was_killed(run: MadeRun) -> None:
    run.event("start", ago=99, step=0)
    assert plain(run).cause == (
        "it ended without a word before its first step; the same command continues from the last checkpoint"
    )
    run.event("resume", ago=50, step=20)
    run.steps(1, 40, ago=10)
    status = plain(run)
    assert status.state == "failed"
    assert status.cause is not None
    assert status.cause.startswith("it ended without a word after step 40; ")
    assert status.restarts == 1


def test_the_first_failure_of_several_ranks_is_the_cause(run: MadeRun) -> None:
    def fails(rank: int, at: float, message: str) -> None:
        record = {"at": at, "message": message, "exit_code": 1, "traceback": ""}
        (folder / f"rank-{rank}.failure.json").write_text(json.dumps(record))

    run.event("start", ago=99, step=0)
    folder = run.directory.logs / "attempt-2"
    folder.mkdir(parents=True)
    fails(0, NOW - 50, "lost the others")
    fails(1, NOW - 45, "the disk is full")
    fails(2, NOW - 4000, "of an earlier start")
    (folder / "rank-3.failure.json").write_text('{"at": 1')
    status = plain(run)
    assert (status.state, status.cause, status.attempt) == ("failed", "rank 1: the disk is full", 2)


def test_a_supervised_run(run: MadeRun) -> None:
    run.launched(ago=500)
    run.supervised(
        "running",
        ago=3,
        attempt=3,
        restarts=2,
        cause="rank 1 on n3 was killed",
        excluded_hosts={"n3": "its link is slow"},
    )
    run.event("resume", ago=80, step=20)
    run.steps(21, 30, ago=1.0)
    status = seen(run, asks=False)
    assert (status.state, status.restarts, status.attempt) == ("running", 2, 3)
    assert status.cause == "rank 1 on n3 was killed"
    assert (status.backend, status.job_id, status.hosts) == ("slurm", "17", ("n1", "n2"))
    assert status.excluded_hosts == ("n3",)
    assert status.excluded_because == {"n3": "its link is slow"}
    assert status.eta_s == pytest.approx(70 * 2.0 - 1.0)


def test_a_job_that_slurm_has_not_confirmed_may_wait(run: MadeRun) -> None:
    run.launched(ago=500, job_id=None)
    status = seen(run, asks=False)
    assert status.state == "queued"
    assert "the same `mega launch` finds it" in (status.queue_reason or "")


def test_hosts_that_an_earlier_job_has_left_out_are_told_before_this_one_begins(run: MadeRun) -> None:
    run.launched(ago=500)
    run.folder.keep_excluded_hosts({"n3": "its link is slow"})
    assert seen(run, PENDING).excluded_because == {"n3": "its link is slow"}
    run.supervised("running", ago=1, excluded_hosts={"n4": "its disk"})
    assert seen(run, asks=False).excluded_hosts == ("n3", "n4")
    run.launched(ago=500, backend="mpi", job_id=None)  # whose hosts somebody lists
    assert seen(run, asks=False).excluded_hosts == ("n4",)


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_what_a_supervisor_has_ended_with_stands(run: MadeRun, state: str) -> None:
    run.launched(ago=5000)
    run.supervised(state, ago=4000, cause="why")
    status = seen(run, asks=False)
    assert (status.state, status.cause) == (state, "why")


def test_a_silent_supervisor_is_told(run: MadeRun) -> None:
    run.launched(ago=5000, backend="local", job_id=None)
    run.supervised("running", ago=300, cause="rank 1 died")
    status = seen(run, asks=False)
    assert status.state == "failed"
    assert status.cause is not None
    assert status.cause.endswith("not been heard of for 5 min; before that: rank 1 died; launch it again")


@pytest.mark.parametrize("state", ["running", "restarting"])
def test_a_silent_supervisor_that_holds_the_run_lives(run: MadeRun, state: str) -> None:
    """Its disk is full, or the file system is slow."""
    run.launched(ago=5000)
    run.supervised(state, ago=300, cause="rank 1 died")
    with locked_run(run.directory.root, say=refuse):
        for queue in (None, {}):
            status = seen(run, queue)
            assert (status.state, status.cause) == (state, "rank 1 died")
    assert seen(run).state == "failed"


def test_where_there_are_no_locks_a_silent_supervisor_lives_while_steps_come(
    run: MadeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.jobs.inspection.run_facts.is_held", lambda root: None)
    run.launched(ago=5000, backend="local", job_id=None)
    run.supervised("running", ago=400)
    run.steps(1, 30, ago=100.0)
    assert seen(run, asks=False).state == "running"
    monkeypatch.setattr("tests.launcher.jobs.inspection.test_status.NOW", NOW + 300)
    assert seen(run, asks=False).state == "failed"


def test_a_supervisor_whose_clock_is_behind_is_not_silent(run: MadeRun) -> None:
    run.launched(ago=5000, backend="local", job_id=None)
    run.supervised("running", ago=300)
    run.age(run.folder.root / "state.json", 2.0)
    assert seen(run, asks=False).state == "running"


def test_of_a_silent_supervisor_the_queue_may_know(run: MadeRun) -> None:
    run.launched(ago=5000)
    run.supervised("running", ago=300, cause="n2 was lost")
    queued = seen(run, PENDING)
    assert (queued.state, queued.queue_reason, queued.cause) == ("restarting", "Resources", "n2 was lost")
    assert seen(run, RUNNING).state == "running"
    run.event("checkpoint", ago=310, step=40)
    gone = seen(run, {})
    assert gone.state == "failed"
    assert gone.cause == (
        "its supervisor on n1 has not been heard of for 5 min, and job 17 is gone; before that: n2 was lost; "
        "launch it again: it goes on from step 40"
    )
    assert seen(run, None).state == "failed"


def test_of_a_supervisor_that_is_quiet_for_seconds_the_queue_tells_whether_it_was_killed(run: MadeRun) -> None:
    run.launched(ago=5000)
    run.supervised("restarting", ago=11)
    assert seen(run, {}).state == "failed"
    assert seen(run, None).state == "restarting"  # nobody knows yet
    assert seen(run, RUNNING).state == "restarting"
    run.supervised("restarting", ago=9)
    assert seen(run, asks=False).state == "restarting"


def test_a_job_that_was_queued_again_waits(run: MadeRun) -> None:
    run.launched(ago=5000)
    run.supervised("queued", ago=300)
    assert seen(run, PENDING).state == "queued"
    assert seen(run, None).state == "queued"
    assert seen(run, RUNNING).state == "running"
    run.supervised("running", ago=300, attempt=0)
    assert seen(run, PENDING).state == "queued"


def test_a_job_whose_supervisor_has_not_begun(run: MadeRun) -> None:
    run.directory.config.unlink()
    run.launched(ago=5000)
    waiting = seen(run, PENDING)
    assert (waiting.state, waiting.queue_reason, waiting.step, waiting.total_steps) == ("queued", "Resources", 0, 100)
    assert seen(run, RUNNING).state == "queued"
    assert seen(run, None).state == "queued"
    gone = seen(run, {})
    assert gone.state == "failed"
    assert gone.cause == (
        "job 17 is not in the queue any more, and its supervisor never began; "
        f"{run.directory.root}/launch/supervisor.log may say why"
    )
    run.launched(ago=5)
    assert seen(run, {}).state == "queued"  # it may have been submitted after the queue was asked


def test_a_local_job_whose_supervisor_never_began(run: MadeRun) -> None:
    run.launched(ago=5, backend="local", job_id=None)
    assert seen(run, asks=False).state == "queued"
    run.launched(ago=400, backend="local", job_id=None)
    assert seen(run, asks=False).cause == (
        "its supervisor never began, 6 min after it was launched on login; "
        f"{run.directory.root}/launch/supervisor.log may say why"
    )


def test_mega_train_may_go_on_with_what_a_job_has_begun(run: MadeRun) -> None:
    run.launched(ago=5000)
    run.supervised("failed", ago=4000, restarts=2, cause="why", excluded_hosts={"n3": "slow"})
    run.event("resume", ago=90, step=20)
    run.event("end", ago=9, step=100)
    status = seen(run, asks=False)
    assert (status.state, status.cause, status.excluded_hosts) == ("finished", None, ())


def test_a_run_under_torchrun_has_no_supervisors_word(run: MadeRun) -> None:
    run.launched(ago=90, backend="torchrun", job_id=None)
    run.event("start", ago=80, step=0)
    with locked_run(run.directory.root, say=refuse):
        status = seen(run, asks=False)
    assert (status.state, status.backend) == ("running", "torchrun")
    run.event("failure", ago=5, kind="exception", message="rank 1: the disk is full")
    assert seen(run, asks=False).cause == "rank 1: the disk is full"


def test_where_there_are_no_locks_what_is_written_tells(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.jobs.inspection.run_facts.is_held", lambda root: None)
    run.event("start", ago=4000, step=0)
    run.steps(1, 30, ago=100.0)
    assert plain(run).state == "running"
    monkeypatch.setattr("tests.launcher.jobs.inspection.test_status.NOW", NOW + 300)
    assert plain(run).state == "failed"


def test_the_queue_is_asked_once_for_all(tmp_path: Path) -> None:
    runs = []
    for number in range(3):
        made = MadeRun(tmp_path / f"r{number}")
        made.launched(ago=500, job_id=str(17 + number))
        runs.append(made)
    runs[1].supervised("running", ago=1)  # tells by itself
    asked: list[list[str]] = []

    def ask(job_ids: Sequence[str]) -> Mapping[str, QueuedJob]:
        asked.append(list(job_ids))
        return PENDING

    states = [status.state for status in run_statuses([made.directory for made in runs], now=NOW, ask_queue=ask)]
    assert asked == [["17", "19"]]
    assert states == ["queued", "running", "failed"]


def test_the_pace_is_that_of_this_start(run: MadeRun) -> None:
    run.event("start", ago=9000, step=0)
    run.steps(1, 20, ago=8000)
    run.event("resume", ago=60, step=20)
    with locked_run(run.directory.root, say=refuse):
        run.steps(21, 21, ago=40)
        assert plain(run).eta_s is None  # the first step compiles
        run.steps(22, 25, ago=20, step_s=5.0)
        assert plain(run).eta_s == pytest.approx(75 * 5.0 - 5.0)


def test_the_total_is_that_of_the_last_configuration(run: MadeRun) -> None:
    run.launched(ago=900)
    run.directory.config.write_text("[train]\nsteps = 200\n")
    run.age(run.folder.config, 50)
    run.age(run.directory.config, 10)
    assert seen(run).total_steps == 200
    run.age(run.directory.config, 90)
    assert seen(run).total_steps == 100


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"7", b"\xff\xfe\x00", b'{"state": "odd"}', b'{"event": 3}\n{"time": "x"']
)
def test_damaged_files_raise_nothing(run: MadeRun, damage: bytes) -> None:
    run.launched(ago=500)
    run.supervised("running", ago=3)
    run.event("start", ago=80, step=0)
    run.steps(1, 3, ago=1)
    for path in (
        run.folder.root / "job.json",
        run.folder.root / "state.json",
        run.folder.config,
        run.directory.config,
        run.directory.events,
        run.directory.metrics,
    ):
        whole = path.read_bytes()
        for content in (damage, whole + damage, whole[: len(whole) // 2]):
            path.write_bytes(content)
            (status,) = run_statuses([run.directory], now=NOW, ask_queue=lambda job_ids: None)
            assert status.state in ("queued", "running", "restarting", "finished", "failed")
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "changes",
    [{"updated": "x"}, {"state": "dancing"}, {"excluded_hosts": 3}, {"hosts": 3}, {"attempt": None}, {"new": 1}],
)
def test_a_damaged_state_is_none(run: MadeRun, changes: dict[str, object]) -> None:
    run.launched(ago=500)
    run.supervised("failed", ago=3, cause="why")
    path = run.folder.root / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert seen(run, PENDING).state == "queued"


def test_a_folder_without_anything(tmp_path: Path) -> None:
    (status,) = run_statuses([RunDirectory(tmp_path / "none")], now=NOW, ask_queue=nobody_asks)
    assert (status.state, status.step, status.last_event) == ("failed", 0, None)


def test_plain_data(run: MadeRun) -> None:
    data = plain(run).as_data()
    assert {"state", "step", "restarts", "cause", "excluded_hosts"} <= data.keys()
    json.dumps(data)
