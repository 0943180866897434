"""Hosts that a job under torchrun waits for are told by name, or by the number that they were to have."""

from __future__ import annotations

import asyncio
from pathlib import Path

from launcher.jobs.job import JobEnd
from launcher.jobs.torchrun.backend import TorchrunBackend
from launcher.jobs.torchrun.meeting import Meeting
from tests.launcher.jobs.torchrun.test_node import Hosts, Lead, all_ends, in_time


def test_who_has_not_come_is_told(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path)

    async def lead(meeting: Meeting) -> JobEnd:
        backend = hosts.backend(meeting, nodes=3)
        assert await backend.hosts() == ("h0", "h1", "h2")
        return JobEnd(exit_code=0)

    in_time(lambda: _with_the_last(hosts, lead))


async def _with_the_last(hosts: Hosts, lead: Lead) -> None:
    others = asyncio.create_task(all_ends(hosts.node(0, lead), hosts.node(2)))
    told = "2 of 3 are there; not there: the host of --node-rank 1: start the same command there"
    while not any(told in said for said in hosts.said):
        await asyncio.sleep(0.01)
    assert await all_ends(hosts.node(1)) == [0]
    assert await others == [0, 0]


def test_a_listed_host_is_told_by_its_name(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path)

    async def lead(meeting: Meeting) -> JobEnd:
        backend = TorchrunBackend(
            meeting,
            listed=("h0", "nohost.invalid"),
            nodes=2,
            fewest=2,
            settle_s=1.1,
            patience_s=1.1,
            goes_on=False,
            stop=hosts.stops["h0"],
            say=hosts.said.append,
        )
        assert await backend.hosts() == ("h0",)
        assert await backend.possible_hosts() == ("h0", "nohost.invalid")
        return JobEnd(exit_code=1)

    in_time(lambda: _alone(hosts, lead))
    told = "1 of 2 are there; not there: nohost.invalid (its name does not resolve here): start the same command there"
    assert any(told in said for said in hosts.said)


async def _alone(hosts: Hosts, lead: Lead) -> None:
    assert await all_ends(hosts.node(0, lead)) == [1]
