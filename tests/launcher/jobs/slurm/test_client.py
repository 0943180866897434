"""What SLURM's programs say, and that they hold nobody up."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable
from datetime import datetime
from typing import TypeVar

import pytest

from launcher.errors import RunError
from launcher.jobs.slurm.client import (
    Answer,
    JobInfo,
    call,
    directives_of,
    environ_for_sbatch,
    is_usable,
    parse_job,
    show_job,
    usable_hosts,
)
from tests.launcher.jobs.fake_slurm import RUNNING_JOB, FakeSlurm

T = TypeVar("T")


def run(work: Awaitable[T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(work, 60)

    return asyncio.run(bounded())


def test_a_job() -> None:
    assert parse_job(RUNNING_JOB) == JobInfo(
        state="RUNNING",
        reason="",
        restarts=0,
        hosts=("n1", "n2", "n3", "n4"),
        excluded="",
        batch_host="n1",
        ends_at=math.inf,
        is_preempted=False,
    )
    preempted = parse_job(RUNNING_JOB.replace("PreemptTime=None", "PreemptTime=2026-11-23T11:01:12"))
    assert preempted.is_preempted
    end = datetime(2026, 11, 23, 11, 1, 16)
    assert parse_job(f"{RUNNING_JOB} EndTime={end.isoformat()}").ends_at == end.timestamp()
    assert parse_job(f"{RUNNING_JOB} EndTime=Unknown").ends_at == math.inf
    # While it is requeued SLURM leaves that field out.
    requeued = parse_job(
        "JobState=COMPLETING Reason=TimeLimit Restarts=1 NodeList=n[1,3] BatchHost=n1 Comment=NodeList=n9"
    )
    assert (requeued.state, requeued.reason, requeued.restarts) == ("COMPLETING", "TimeLimit", 1)
    assert requeued.hosts == ("n1", "n3")
    assert not requeued.is_preempted
    waiting = parse_job("JobState=PENDING Reason=BeginTime Restarts=1 ReqNodeList=n7 NodeList= NumNodes=4")
    assert waiting.hosts == ()


@pytest.mark.parametrize(
    "state", ["idle", "allocated", "mixed", "completing", "reserved", "planned", "allocated+", "mixed-"]
)
def test_hosts_that_work(state: str) -> None:
    assert is_usable(state)


@pytest.mark.parametrize(
    "state",
    ["down", "down*", "allocated*", "idle~", "drained", "draining*", "fail", "failing", "unknown", "no_respond"],
)
def test_hosts_that_do_not(state: str) -> None:
    assert not is_usable(state)


def test_usable_hosts_keep_their_order(fake_slurm: FakeSlurm) -> None:
    # A line for each partition that a host is in.
    fake_slurm.program("sinfo", r'printf "n3|allocated\nn1|mixed\nn1|mixed\nn2|allocated*\nn10|draining\n"')
    assert run(usable_hosts(("n3", "n10", "n1", "n2", "n4"))) == ("n3", "n1")
    assert fake_slurm.calls() == ["sinfo --all --Node --noheader --nodes=n[1-4,10] --format=%N|%T"]
    assert run(usable_hosts(())) == ()


def test_who_does_not_answer_is_not_waited_for(fake_slurm: FakeSlurm) -> None:
    fake_slurm.program("sinfo", "exec sleep 1000")
    with pytest.raises(RunError, match=r"sinfo has not answered for 0.2 s: does SLURM's controller run\?"):
        run(call("sinfo", timeout_s=0.2))
    with pytest.raises(RunError, match="nosuch cannot be started: No such file or directory"):
        run(call("nosuch"))


def test_a_job_that_slurm_does_not_know(fake_slurm: FakeSlurm) -> None:
    fake_slurm.program("scontrol", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    with pytest.raises(RunError, match=r"^job 7: slurm_load_jobs error: Invalid job id specified$"):
        run(show_job("7"))


@pytest.mark.parametrize(
    ("err", "said"),
    [
        ("sbatch: error: invalid partition specified: x\nallocation failure: Invalid partition name specified\n",
         "invalid partition specified: x; allocation failure: Invalid partition name specified"),
        ("sbatch: Job 3 to start at 2026 using 4 processors\n", "Job 3 to start at 2026 using 4 processors"),
        ("scontrol: fatal: no\n", "no"),
        ("", "exit code 3"),
    ],
)  # fmt: skip
def test_complaints(err: str, said: str) -> None:
    assert Answer(code=3, out="", err=err).complaint == said


def test_what_a_job_inherits() -> None:
    script = "#SBATCH --partition=train\n#SBATCH --time=1:00\n#SBATCH --no-kill\n#SBATCH --open-mode append\necho\n"
    directives = directives_of(script)
    assert directives == {"partition": "train", "time": "1:00", "no-kill": "", "open-mode": "append"}
    given = {
        "SLURM_CONF": "/etc/x",
        "SLURM_JOB_ID": "3",
        "SLURM_RESTART_COUNT": "2",
        "SBATCH_PARTITION": "debug",
        "SBATCH_TIMELIMIT": "9",
        "SBATCH_OPEN_MODE": "truncate",
        "SBATCH_ACCOUNT": "lab",
        "HOME": "/root",
    }
    assert environ_for_sbatch(given, directives) == {"SLURM_CONF": "/etc/x", "SBATCH_ACCOUNT": "lab", "HOME": "/root"}
