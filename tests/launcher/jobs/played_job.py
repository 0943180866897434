"""A head and its attempt whose agents are played by the test."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from launcher.jobs.agents.head import Attempt, Head, RanksPlan
from launcher.jobs.agents.protocol import Start
from tests.launcher.jobs.fake_agent import TOKEN, FakeAgent


class Job:
    """A head and its attempt, in the folder of the test."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "attempt-1" / "job.log"
        self.said: list[str] = []
        self.shown: list[str] = []

    @contextlib.asynccontextmanager
    async def head(self, expected: Mapping[str, int], silence_s: float = 60.0) -> AsyncIterator[tuple[Head, Attempt]]:
        async with Head(token=TOKEN, silence_s=silence_s, say=self.said.append) as head:
            yield head, head.attempt(1, expected=expected, log=self.log, echo=self.shown.append)

    def plan(self, *hosts: str, ranks_per_host: int = 1, **fields: Any) -> RanksPlan:
        return RanksPlan(
            hosts=hosts,
            ranks_per_host=ranks_per_host,
            command=("train", "it"),
            environ={"A": "b"},
            directory=self.log.parent,
            **fields,
        )

    async def start(
        self, head: Head, attempt: Attempt, *hosts: str, ranks_per_host: int = 1
    ) -> tuple[dict[str, FakeAgent], dict[str, Start]]:
        """One agent on each host, and its ranks."""
        agents = {host: await FakeAgent.come(head, host) for host in hosts}
        assert await attempt.gather(60) == ()
        starting = asyncio.ensure_future(attempt.start_ranks(self.plan(*hosts, ranks_per_host=ranks_per_host)))
        orders = {host: await agent.start() for host, agent in agents.items()}
        await starting
        return agents, orders
