"""Too few hosts: which are missing, and why, is told where people look."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher.errors import RunError
from launcher.jobs.supervision.host_lack import not_there
from tests.launcher.jobs.made_up_hosts import MadeUpJob


def test_a_host_whose_name_does_not_resolve_is_told_from_one_that_is_not_started() -> None:
    said = asyncio.run(not_there("torchrun", ["localhost", "nohost.invalid", "the host of --node-rank 1"]))
    assert said.startswith(
        "; not there: localhost, nohost.invalid (its name does not resolve here), the host of --node-rank 1: "
        "start the same command there"
    )


def test_many_hosts_are_counted_and_none_are_not_told() -> None:
    assert asyncio.run(not_there("local", [])) == ""
    said = asyncio.run(not_there("slurm", [f"n{number}" for number in range(100)]))
    assert "n7 and 92 more: `sinfo -R` tells why" in said


def test_who_is_waited_for_stands_in_the_status_while_it_is_waited_for(tmp_path: Path) -> None:
    job = MadeUpJob(tmp_path, ["a"], "", launch="nodes = 2")
    job.backend.possible = ["a", "b"]

    async def come_late() -> None:
        told = "waiting for hosts: 1 host is there, and 2 needed (launch.nodes); not there: b"
        await job.until(lambda: job.state().cause == told if job.folder.read_state() else False)
        job.backend.there.append("b")

    assert job.supervise(come_late).exit_code == 0
    assert any("1 host is there, and 2 needed (launch.nodes); not there: b: waiting up to" in said for said in job.said)
    assert job.events("failure") == []


@pytest.mark.parametrize("wait", [0.0, 0.1])
def test_that_hosts_cannot_be_asked_for_is_the_cause(tmp_path: Path, wait: float) -> None:
    job = MadeUpJob(tmp_path, ["a"], "", launch=f"wait_for_hosts_seconds = {wait}")
    job.backend.accepts_requeue = False

    async def fail() -> Sequence[str]:
        raise RunError("sinfo cannot be started: No such file or directory")

    job.backend.hosts, job.backend.possible_hosts = fail, fail  # type: ignore[method-assign]
    assert job.supervise().exit_code == 1
    trouble = "hosts are not known: sinfo cannot be started: No such file or directory"
    assert job.state().cause == f"no host is left, and 1 needed (launch.nodes); {trouble}"
    assert sum(trouble in said and "giving up" not in said and "waiting" not in said for said in job.said) == 1
