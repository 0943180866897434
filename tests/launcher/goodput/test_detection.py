"""How long it took until a failure was told, and the run trained again: from when it happened, as far as records tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher.goodput.story import COMPILE_S, STEP_S, Story

_RECORDS_S = 0.02
"""What the writing of records may take."""


@pytest.fixture
def story(tmp_path: Path) -> Story:
    """A run that has made its first seven steps, and saved the fifth."""
    story = Story(root=tmp_path / "run")
    story.launched()
    story.attempts()
    story.loads()
    story.trains(7)
    return story


def goes_on(story: Story) -> float:
    """The run trains again; returns when the first step of that ended."""
    story.attempts()
    story.loads()
    story.trains(1)
    return story.clock


def test_a_rank_that_is_killed_counts_from_its_death_to_the_event(story: Story) -> None:
    killed = story.clock + 0.7
    story.fails(after_s=3.2, at=killed, kind="signal")
    again = goes_on(story)
    (failure,) = story.ledger(running=True).failures
    assert failure.detect_s == pytest.approx(2.5, abs=1e-5)
    assert failure.train_again_s == pytest.approx(again - killed, abs=_RECORDS_S)


def test_a_hang_counts_from_the_last_step_before_it(story: Story) -> None:
    last_step = story.clock
    story.fails(after_s=90.0, at=None, kind="hang")
    (failure,) = story.ledger(running=True).failures
    assert failure.detect_s == pytest.approx(90.0, abs=_RECORDS_S)
    # When the steps since the checkpoint are made again, their lines are gone.
    again = goes_on(story)
    (failure,) = story.ledger(running=True).failures
    assert failure.lost_steps == 2
    assert failure.detect_s == pytest.approx(90.0, abs=_RECORDS_S)
    assert failure.train_again_s == pytest.approx(again - last_step, abs=_RECORDS_S)


def test_a_hang_of_which_the_watch_tells_since_when_counts_from_there(story: Story) -> None:
    hung = story.clock + 2.5
    story.fails(after_s=22.0, at=hung, kind="hang")
    again = goes_on(story)
    (failure,) = story.ledger(running=True).failures
    assert failure.detect_s == pytest.approx(19.5, abs=_RECORDS_S)
    assert failure.train_again_s == pytest.approx(again - hung, abs=_RECORDS_S)


def test_a_hang_after_a_validation_counts_from_its_end(story: Story) -> None:
    story.validates(seconds=50.0)
    story.fails(after_s=90.0, at=None, kind="hang")
    (failure,) = story.ledger(running=True).failures
    assert failure.detect_s == pytest.approx(90.0, abs=_RECORDS_S)


def test_a_hang_before_the_first_step_of_its_attempt_is_not_dated(story: Story) -> None:
    story.fails(kind="signal", at=story.clock)
    story.attempts()
    story.loads()
    story.fails(after_s=90.0, at=None, kind="hang")
    again = goes_on(story)
    hang = story.ledger(running=True).failures[1]
    assert (hang.happened, hang.detect_s) == (None, None)
    assert hang.train_again_s == pytest.approx(again - hang.time, abs=_RECORDS_S)


def test_a_hang_of_whose_attempt_all_steps_were_lost_with_those_of_the_next_is_not_dated(story: Story) -> None:
    story.trains(4, first=False)
    story.fails(after_s=90.0, at=None, kind="hang")
    story.attempts()
    story.loads()
    story.trains(3, saves=False)
    story.fails(after_s=1.0, at=story.clock)
    story.saved = 5  # the checkpoint of step 10 is damaged
    goes_on(story)
    hang = story.ledger(running=True).failures[0]
    assert hang.detect_s is None


def test_what_is_no_hang_and_not_dated_stays_so(story: Story) -> None:
    story.fails(after_s=120.0, at=None, kind="never_came")
    again = goes_on(story)
    (failure,) = story.ledger(running=True).failures
    assert failure.detect_s is None
    assert failure.train_again_s == pytest.approx(again - failure.time, abs=_RECORDS_S)
    assert failure.train_again_s > STEP_S + COMPILE_S
