"""What follows from a failed attempt."""

from typing import Any

import pytest

from launcher.jobs.config import LaunchConfig
from launcher.jobs.supervision.attempt_end import Failure
from launcher.jobs.supervision.decision import Decision, decide, restart_delay

_KILLED = Failure(kind="signal", message="rank 3 of 4 on n3 was killed by SIGKILL", rank=3, host="n3")


def _decide(failure: Failure, launch: dict[str, Any] | None = None, **changes: Any) -> Decision:
    known = {
        "attempts_without_progress": 0,
        "has_progressed": False,
        "losses": {},
        "can_do_without": lambda host: True,
        **changes,
    }
    return decide(failure, launch=LaunchConfig.model_validate(launch or {}), **known)


def test_a_crash_is_tried_again() -> None:
    decision = _decide(_KILLED)
    assert decision.restarts
    assert (decision.cause, decision.attempts_without_progress, decision.delay_s) == (_KILLED.message, 1, 1.0)


def test_the_third_attempt_without_a_new_checkpoint_is_the_last() -> None:
    assert _decide(_KILLED, attempts_without_progress=1).restarts
    last = _decide(_KILLED, attempts_without_progress=2)
    assert not last.restarts
    assert last.cause == f"{_KILLED.message}; 3 attempts in a row without a new checkpoint"
    assert last.exit_code == 1


def test_one_attempt_can_be_all() -> None:
    last = _decide(_KILLED, {"max_attempts_without_progress": 1})
    assert not last.restarts
    assert last.cause.endswith("SIGKILL; 1 attempt without a new checkpoint")


def test_a_new_checkpoint_begins_the_count_anew() -> None:
    decision = _decide(_KILLED, attempts_without_progress=2, has_progressed=True)
    assert decision.restarts
    assert decision.attempts_without_progress == 0


@pytest.mark.parametrize("code", [2, 3])
def test_what_the_next_attempt_would_say_again_ends_the_job(code: int) -> None:
    decision = _decide(Failure(kind="exception", message="no such file", exit_code=code), has_progressed=True)
    assert (decision.restarts, decision.exit_code, decision.cause) == (False, code, "no such file")


def test_a_bad_host_is_excluded_and_does_not_count() -> None:
    refusal = Failure(kind="preflight", message="n3 is slow", exit_code=3, bad_hosts={"n3": "n3 is slow"})
    decision = _decide(refusal, attempts_without_progress=2)
    assert decision.restarts
    assert decision.exclude == {"n3": "n3 is slow"}
    assert (decision.attempts_without_progress, decision.delay_s) == (2, 0.0)
    stopped = _decide(refusal, {"preflight": {"on_bad_host": "stop"}})
    assert (stopped.restarts, stopped.exit_code, stopped.exclude) == (False, 3, {})


def test_a_host_whose_ranks_did_not_answer_preflight_is_excluded_and_counts() -> None:
    refusal = Failure(
        kind="preflight", message="rank 3 did not answer", exit_code=3, bad_hosts={"n3": "silent"}, is_unanswered=True
    )
    decision = _decide(refusal, attempts_without_progress=1)
    assert (decision.restarts, decision.attempts_without_progress, decision.exclude) == (True, 2, {"n3": "silent"})
    last = _decide(refusal, attempts_without_progress=2)
    assert (last.restarts, last.cause) == (
        False,
        "rank 3 did not answer; 3 attempts in a row without a new checkpoint",
    )


def test_a_refusal_that_is_no_hosts_fault_ends_the_job() -> None:
    decision = _decide(Failure(kind="preflight", message="torch differs", exit_code=3))
    assert (decision.restarts, decision.exit_code, decision.cause) == (False, 3, "torch differs")


def test_a_host_that_was_lost_twice_in_a_row_is_excluded_where_others_are_left() -> None:
    lost = Failure(kind="host_lost", message="host n3 was lost", host="n3", lost_hosts=("n3",))
    assert _decide(lost, losses={"n3": 1}).exclude == {}
    assert _decide(lost, losses={"n3": 2}).exclude == {"n3": "was lost 2 times in a row"}
    assert _decide(lost, losses={"n3": 2}, can_do_without=lambda host: False).exclude == {}


def test_the_delay_doubles_up_to_a_minute_unless_a_longer_one_is_asked_for() -> None:
    assert [restart_delay(4.0, count) for count in (0, 1, 2, 3, 4, 5, 6, 5000)] == [4, 4, 8, 16, 32, 60, 60, 60]
    assert restart_delay(90.0, 3) == 90.0
    assert restart_delay(0.0, 3) == 0.0


def test_an_attempt_that_could_not_begin_is_not_tried_again_at_once() -> None:
    decisions = [_decide(_KILLED, attempts_without_progress=count, least_delay_s=20.0) for count in (0, 1)]
    assert [decision.delay_s for decision in decisions] == [20.0, 40.0]
    assert _decide(_KILLED, {"restart_delay_seconds": 50.0}, least_delay_s=20.0).delay_s == 50.0
