"""A host that takes over a job under way goes on with it as it is, rather than begin it anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.jobs.job import Job, JobEnd
from launcher.jobs.job_record import JobFolder
from launcher.jobs.submission.plan import plan_launch
from launcher.jobs.torchrun import run
from launcher.jobs.torchrun.meeting import Meeting
from launcher.jobs.torchrun.roster import Roster


class _Leader:
    """A host that leads at once, and was told that the job `goes_on`."""

    goes_on = True

    def __init__(self, roster: Roster, launch: object, *, token: str, lead: Any, **more: object) -> None:
        self._meeting = Meeting(token=token, host=roster.name, silence_s=1.0, say=lambda text: None)
        self._lead = lead

    async def run(self) -> int:
        end: JobEnd = await self._lead(self._meeting, goes_on=self.goes_on)
        return end.exit_code


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_host_that_takes_over_is_no_new_start_of_the_job(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
    """So `mega cancel`, which may have ended the leader before, stands: see `first_state`."""
    environ: Mapping[str, str] = {}
    plan = plan_launch([tiny], [], backend="torchrun", environ=environ, hostfile=None)
    folder = JobFolder(plan.run)
    run.write_job_files(plan)
    folder.ask_to_cancel()
    seen: list[tuple[bool, bool]] = []

    async def supervise(job: Job, **more: object) -> JobEnd:
        seen.append((job.backend.is_restart, job.folder.is_cancelled()))
        return JobEnd(exit_code=75)

    monkeypatch.setattr(run, "supervise", supervise)
    monkeypatch.setattr(run, "Node", _Leader)
    monkeypatch.setattr(_Leader, "goes_on", goes_on)
    roster = Roster(leaders=("n0",), place=0, name="n0", rank=0, port=0)
    end = run.run_torchrun(plan, roster, environ=environ, say=lambda text: None, show=lambda text: None)
    assert end.exit_code == 75
    assert seen == [(goes_on, goes_on)]
