"""Of many failed ranks the first cause is told."""

from dataclasses import dataclass

import pytest

from launcher.failure_record import FailureRecord
from launcher.first_cause import first_failure, have_stopped, how_it_ended, signal_name


@dataclass(frozen=True, kw_only=True)
class _End:
    code: int
    at: float = 100.0
    record: FailureRecord | None = None
    last_line: str = ""
    ended_by_us: bool = False


def _failed(message: str, at: float, code: int = 1) -> _End:
    return _End(code=code, at=200.0, record=FailureRecord(at=at, message=message, exit_code=code, traceback=""))


def test_an_own_failure_comes_before_the_loss_of_another_rank_and_that_before_our_own_kill() -> None:
    lost = _failed("rank 0 lost the others in a barrier (Connection closed by peer)", at=1.0)
    own = _failed("the disk is full", at=3.0)
    killed_by_us = _End(code=-9, at=0.5, ended_by_us=True)
    assert first_failure([killed_by_us, lost, own]) is own
    assert first_failure([killed_by_us, lost]) is lost
    assert first_failure([killed_by_us]) is killed_by_us


def test_the_earliest_by_its_own_account_is_first_however_late_its_process_ended() -> None:
    record = _failed("the disk is full", at=3.0)
    signal = _End(code=-11, at=4.0)
    assert first_failure([signal, record]) is record
    assert first_failure([_End(code=-11, at=2.0), record]).code == -11


def test_ranks_that_are_done_or_have_stopped_have_not_failed() -> None:
    assert first_failure([_End(code=0), _End(code=75)]) is None


def test_a_run_has_stopped_when_the_others_but_missed_one_that_has() -> None:
    lost = _failed("rank 0 lost the others in a barrier", at=1.0)
    assert have_stopped([_End(code=75), lost, _End(code=-9, ended_by_us=True), _End(code=0)], was_asked=False)
    assert not have_stopped([_End(code=75), _failed("the disk is full", at=1.0)], was_asked=True)
    assert not have_stopped([_End(code=0), lost], was_asked=True)


def test_a_rank_that_we_have_ended_before_its_first_step_has_not_stopped_the_run() -> None:
    lost = _failed("rank 0 lost the others in a barrier", at=1.0)
    ended = _End(code=75, ended_by_us=True)
    assert not have_stopped([ended, lost], was_asked=False)
    assert have_stopped([ended, lost], was_asked=True)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (_failed("the disk is full", at=1.0), ": the disk is full"),
        (_End(code=-9), " was killed by SIGKILL; the kernel does this when memory runs out"),
        (_End(code=-11), " was killed by SIGSEGV"),
        (_End(code=5), " ended with exit code 5"),
        (_End(code=0), " ended before the run was done, with exit code 0"),
        (_End(code=5, last_line="Segments are at fault"), " ended with exit code 5: Segments are at fault"),
    ],
)
def test_the_words_for_an_end(end: _End, words: str) -> None:
    assert how_it_ended(end) == words


def test_a_signal_without_a_name_is_told_by_its_number() -> None:
    assert signal_name(40) == "signal 40"
