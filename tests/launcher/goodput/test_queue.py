"""How long the jobs of a run waited in the queue."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher.goodput.story import Story


def test_a_job_in_the_queue_is_counted_from_its_submission(tmp_path: Path) -> None:
    story = Story(root=tmp_path)
    story.passes(60.0, "queued")
    story.check(running=True, submitted=story.began)


def test_a_job_that_was_submitted_again_waits_in_the_queue(story: Story) -> None:
    story.loads()
    story.trains(5)  # killed
    story.passes(100.0, "stopped")
    submitted = story.clock
    story.passes(50.0, "queued")
    story.check(running=True, submitted=submitted)
    story.event("launch", backend="slurm", job_id="18", nodes=2, host="n1")
    story.attempts()
    story.loads()
    story.trains(2)
    story.check(running=True, submitted=submitted)


def test_each_job_of_a_run_has_waited_since_its_own_submission(story: Story) -> None:
    for job_id in ("17", "18"):
        story.launched(queued_s=40.0, job_id=job_id)
        story.attempts()
        story.loads()
        story.trains(5)
        story.stops()
        story.passes(100.0, "stopped")
    story.passes(50.0, "queued")
    # What the record of the job has, which knows of the last one alone, adds nothing to the events of the others.
    ledger = story.check(running=True, submitted=story.clock - 50.0)
    assert ledger.spent["queued"] == pytest.approx(130e6, abs=1e4)


def test_another_leader_of_a_job_without_a_queue_has_not_waited_in_one(story: Story) -> None:
    story.launched(job_id=None)
    submitted = story.clock
    story.attempts()
    story.loads()
    story.trains(5)  # then somebody ends all hosts
    story.passes(20.0, "stopped")
    story.event("launch", backend="torchrun", job_id=None, nodes=2, host="n2", submitted=submitted)
    story.attempts()
    story.loads()
    story.trains(5)
    story.check(running=True)
