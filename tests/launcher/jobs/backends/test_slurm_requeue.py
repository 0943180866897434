"""Another start of a job of SLURM, and who wants its hosts back."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import RunError
from launcher.jobs.config import SlurmConfig
from tests.launcher.jobs.backends.slurm_case import Case, run
from tests.launcher.jobs.fake_slurm import FakeSlurm


def test_another_start_on_other_hosts(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    case = Case(tmp_path, SlurmConfig(exclude="n[8-9]"))
    fake_slurm.job()
    case.has_requeued(1)
    assert run(case.backend.requeue(without=("n2", "n3"), reason="hosts"))
    # The list of a running job cannot be changed, so this order.
    assert fake_slurm.calls()[1:] == ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n[8-9],n2,n3"]


def test_hosts_that_the_job_is_not_to_get_already_stay_out(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    """Those of the script, which an earlier job of the run has found bad, and those of an administrator."""
    case = Case(tmp_path, SlurmConfig(exclude="n9"))
    fake_slurm.job(ExcNodeList="n[2,9],x1")
    assert run(case.backend.requeue(without=("n2", "n3"), reason="hosts"))
    assert fake_slurm.calls()[-1] == "scontrol update JobId=7 ExcNodeList=n[2,9],x1,n3"


def test_the_signal_of_a_requeue_keeps_no_bad_host_in_the_job(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    """It ends the very program that is just to keep them out."""
    case = Case(tmp_path)
    fake_slurm.job()
    fake_slurm.program(
        "scontrol",
        '[ "$1" = update ] && [ ! -e "$FAKE/told" ] && { touch "$FAKE/told"; kill -TERM $$; }; cat "$FAKE/job"',
    )
    assert run(case.backend.requeue(without=("n2",), reason="hosts"))
    assert fake_slurm.calls()[2:] == ["scontrol update JobId=7 ExcNodeList=n2"] * 2
    assert case.said == []


def test_another_start_on_the_same_hosts(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    case = Case(tmp_path)
    fake_slurm.job()
    assert run(case.backend.requeue(without=(), reason="time_limit"))
    assert fake_slurm.calls()[1:] == ["scontrol requeue 7"]


def test_slurm_has_queued_the_job_again_already(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    case = Case(tmp_path, SlurmConfig(requeue=False), SLURM_RESTART_COUNT="2")
    fake_slurm.job(JobState="COMPLETING", Restarts="3")
    assert run(case.backend.is_preempted())
    assert run(case.backend.requeue(without=("n2",), reason="preemption"))
    assert fake_slurm.calls()[-1] == "scontrol update JobId=7 ExcNodeList=n2"
    assert not any("requeue" in call for call in fake_slurm.calls())


@pytest.mark.parametrize("job_state", ["COMPLETING", "CANCELLED"])
def test_a_job_that_somebody_cancels_does_not_come_back(fake_slurm: FakeSlurm, tmp_path: Path, job_state: str) -> None:
    case = Case(tmp_path)
    fake_slurm.job(JobState=job_state)
    assert not run(case.backend.requeue(without=("n2",), reason="preemption"))
    assert fake_slurm.calls() == ["scontrol --oneliner show job 7"]
    assert case.said == ["job 7 is being cancelled, so it is not queued again"]


def test_a_job_whose_time_is_over_does(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    case = Case(tmp_path)
    fake_slurm.job(JobState="COMPLETING", Reason="TimeLimit")
    assert run(case.backend.requeue(without=(), reason="time_limit"))
    assert fake_slurm.calls()[-1] == "scontrol requeue 7"


_FAILS = '[ "$1" = {verb} ] && {{ echo "slurm_load_jobs error: {words}" >&2; exit 1; }}; cat "$FAKE/job"'


@pytest.mark.parametrize("words", ["Unable to contact slurm controller (connect failure)", "Socket timed out"])
def test_a_controller_that_does_not_answer_is_to_be_asked_again(
    fake_slurm: FakeSlurm, tmp_path: Path, words: str
) -> None:
    """By the supervisor, for which that is an error."""
    fake_slurm.job()
    case = Case(tmp_path)
    fake_slurm.program("scontrol", _FAILS.format(verb="--oneliner", words=words))
    for ask in (case.backend.is_preempted(), case.backend.requeue(without=(), reason="preemption")):
        with pytest.raises(RunError, match="job 7: "):
            run(ask)
    fake_slurm.program("scontrol", _FAILS.format(verb="requeue", words=words))
    with pytest.raises(RunError, match="scontrol requeue 7: "):
        run(case.backend.requeue(without=(), reason="preemption"))
    assert case.said == []


def test_slurm_has_taken_what_it_did_not_confirm(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.job()
    fake_slurm.program(
        "scontrol",
        'cat "$FAKE/job"; [ "$1" = requeue ] && { sed -i s/Restarts=0/Restarts=1/ "$FAKE/job"; exit 1; }; exit 0',
    )
    case = Case(tmp_path)
    with pytest.raises(RunError):
        run(case.backend.requeue(without=(), reason="preemption"))
    assert run(case.backend.requeue(without=(), reason="preemption"))
    assert fake_slurm.calls() == [
        "scontrol --oneliner show job 7",
        "scontrol requeue 7",
        "scontrol --oneliner show job 7",
    ]


@pytest.mark.parametrize(
    ("config", "requeues", "restarts", "may"),
    [
        (SlurmConfig(requeue=False), 1, 0, False),
        (SlurmConfig(max_requeues=3), 3, 0, True),
        (SlurmConfig(max_requeues=3), 4, 0, False),
        (SlurmConfig(max_requeues=3), 1, 3, False),
        (SlurmConfig(max_requeues=0), 1, 0, False),
    ],
)
def test_requeues_are_counted(
    fake_slurm: FakeSlurm, tmp_path: Path, config: SlurmConfig, requeues: int, restarts: int, may: bool
) -> None:
    case = Case(tmp_path, config, SLURM_RESTART_COUNT=str(restarts))
    fake_slurm.job(Restarts=str(restarts))
    case.has_requeued(requeues)
    assert run(case.backend.requeue(without=(), reason="hosts")) is may
    assert any("requeue" in call for call in fake_slurm.calls()) is may
    if not may and config.requeue:
        assert f"slurm.max_requeues = {config.max_requeues}" in case.said[0]


@pytest.mark.parametrize(
    "words",
    [
        "Access/permission denied",
        "Requested operation is presently disabled",
        "Operation not permitted on individual component of heterogeneous job",
        "Only batch jobs are accepted or processed",
    ],
)
def test_a_refusal_for_good_is_told_and_ends_the_matter(fake_slurm: FakeSlurm, tmp_path: Path, words: str) -> None:
    case = Case(tmp_path)
    fake_slurm.job()
    fake_slurm.program("scontrol", _FAILS.format(verb="requeue", words=words))
    assert not run(case.backend.requeue(without=("n2",), reason="hosts"))
    assert case.said == [f"SLURM refuses: scontrol requeue 7: slurm_load_jobs error: {words}"]
    assert fake_slurm.calls()[1:] == ["scontrol requeue 7"]


def test_hosts_that_slurm_may_give_again_are_told(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    case = Case(tmp_path)
    fake_slurm.job()
    fake_slurm.program("scontrol", '[ "$1" = update ] && { echo "Access denied" >&2; exit 1; }; cat "$FAKE/job"')
    assert run(case.backend.requeue(without=("n2",), reason="hosts"))
    assert case.said == ["SLURM may give the job n2 again: Access denied"]


@pytest.mark.parametrize(
    ("changes", "is_preempted"),
    [
        ({}, False),
        ({"PreemptTime": "2026-11-23T11:01:12"}, True),
        ({"JobState": "COMPLETING", "Restarts": "1"}, True),
        ({"JobState": "COMPLETING", "Reason": "TimeLimit"}, True),
        # scancel: a job that comes back then would anger its user.
        ({"JobState": "COMPLETING"}, False),
    ],
)
def test_who_wants_the_hosts_back(
    fake_slurm: FakeSlurm, tmp_path: Path, changes: dict[str, str], is_preempted: bool
) -> None:
    fake_slurm.job(**changes)
    assert run(Case(tmp_path).backend.is_preempted()) is is_preempted


def test_a_job_that_slurm_does_not_know_any_more_is_not_preempted(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.program("scontrol", _FAILS.format(verb="--oneliner", words="Invalid job id specified"))
    case = Case(tmp_path)
    assert not run(case.backend.is_preempted())
    assert case.said[0].startswith("SLURM refuses: job 7: ")
