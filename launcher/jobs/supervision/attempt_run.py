"""One attempt: agents come, ranks start and are watched, and nothing of it is left when it has ended."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.errors import RunError
from launcher.fabric_place import rank_hosts_variable
from launcher.jobs.agents.head import Attempt, Head, HostLost, RanksPlan
from launcher.jobs.agents.protocol import ATTEMPT, PREFLIGHT
from launcher.jobs.backend import Agents, AgentsStart
from launcher.jobs.backends.starter import AGENTS_LOG, hosts_in_words, last_words
from launcher.jobs.job import Job
from launcher.jobs.journal import Journal
from launcher.jobs.stop_asked import StopAsked
from launcher.jobs.supervision.attempt_end import AttemptEnd, Failure
from launcher.jobs.supervision.first_failure import Scene, StarterEnd, of_absence, of_lost_host, of_starter
from launcher.jobs.supervision.preflight_verdict import PreflightVerdict
from launcher.jobs.supervision.ranks_watch import RanksWatch
from launcher.jobs.supervision.stopping import Stopping

_EVENT_SECONDS = 0.5
"""For an event that the head has told already."""


class AttemptRun:
    """The attempt number `number`, with its folder `logs/attempt-K`, on chosen hosts."""

    def __init__(
        self,
        job: Job,
        *,
        head: Head,
        journal: Journal,
        stop: StopAsked,
        stopping: Stopping,
        number: int,
        directory: Path,
        hosts: Sequence[str],
    ) -> None:
        self._job = job
        self._head = head
        self._journal = journal
        self._stop = stop
        self._stopping = stopping
        self._number = number
        self._directory = directory
        self._hosts = tuple(hosts)
        self._num_ranks = len(hosts) * job.ranks_per_host
        self._max_log_bytes = int(job.launch.max_rank_log_mb * 1e6)
        self._output = directory / AGENTS_LOG
        self._began = time.time()
        self._verdict_is_told = False

    async def run(self) -> AttemptEnd:
        """From the first agent to the last."""
        agents_per_host = self._job.ranks_per_host if self._job.backend.task_per_rank else 1
        attempt = self._head.attempt(
            self._number,
            expected=dict.fromkeys(self._hosts, agents_per_host),
            log=self._directory / "job.log",
            echo=self._job.show,
            max_log_bytes=self._max_log_bytes,
        )
        agents: Agents | None = None
        try:
            agents = await self._job.backend.start(
                AgentsStart(
                    hosts=self._hosts,
                    agents_per_host=agents_per_host,
                    environ={**self._head.environ, ATTEMPT: str(self._number)},
                    output=self._output,
                )
            )
            end = await self._gather(attempt, agents) or await self._train(attempt, agents)
            await attempt.release()
            if end.failure is None or not end.failure.lost_hosts:  # else some never hear that they are sent home
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(agents.wait(), self._job.patience.released)
            return end
        finally:
            attempt.abandon()
            if agents is not None:
                await agents.end()

    async def _gather(self, attempt: Attempt, agents: Agents) -> AttemptEnd | None:
        """Until all agents have come; the attempt's end where they do not, or a stop is asked before."""
        timeout_s = self._job.launch.start_timeout_seconds
        come = asyncio.ensure_future(attempt.gather(timeout_s))
        starter = asyncio.ensure_future(agents.wait())
        stop = asyncio.ensure_future(self._stop.asked.wait())
        try:
            await asyncio.wait((come, starter, stop), return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                return AttemptEnd(outcome="stopped")
            if come.done() and not come.result():
                return None
            words = await asyncio.to_thread(last_words, self._output)
            if not come.done():
                blamed = await asyncio.to_thread(hosts_in_words, self._output, self._hosts)
                code, backend = starter.result(), self._job.backend.name
                end = StarterEnd(at=time.time(), code=code, words=words, backend=backend)
                failure = replace(of_starter(end, blamed, log=self._output), has_begun=False)
            elif (lost := await _lost_before_start(attempt)) is not None:
                scene = Scene(num_ranks=self._num_ranks, logs=self._directory, step=None, doing={})
                failure = of_lost_host(lost, scene, silence_s=self._job.launch.lost_host_seconds)
            else:
                failure = of_absence(come.result(), self._hosts, seconds=timeout_s, words=words)
            return AttemptEnd(outcome="failed", failure=failure)
        finally:
            await _cancel(come, starter, stop)

    async def _train(self, attempt: Attempt, agents: Agents) -> AttemptEnd:
        verdict = None
        environ = {**self._job.environ, **rank_hosts_variable(self._hosts)}
        if self._job.launch.preflight.enabled:
            verdict = PreflightVerdict(self._directory / "preflight.json")
            environ[PREFLIGHT] = str(verdict.path.absolute())
        watch = RanksWatch(
            self._job,
            attempt,
            agents,
            self._stop,
            self._stopping,
            num_ranks=self._num_ranks,
            directory=self._directory,
            output=self._output,
            verdict=verdict,
        )
        await attempt.start_ranks(
            RanksPlan(
                hosts=self._hosts,
                ranks_per_host=self._job.ranks_per_host,
                command=self._job.rank_command,
                environ=environ,
                directory=self._directory,
                max_log_bytes=self._max_log_bytes,
            )
        )
        await self._journal.update(state="running")
        await self._journal.event("ranks_started", attempt=self._number, seconds=time.time() - self._began)
        if verdict is None:
            return await watch.until_all_have_ended()
        telling = asyncio.ensure_future(self._tell_when_there(verdict))
        try:
            end = await watch.until_all_have_ended()
            await self._tell(verdict)
        finally:
            await _cancel(telling)
        return end

    async def _tell_when_there(self, verdict: PreflightVerdict) -> None:
        while not await self._tell(verdict):
            await asyncio.sleep(self._job.patience.look)

    async def _tell(self, verdict: PreflightVerdict) -> bool:
        """Writes the event `preflight` where the ranks have come so far; returns whether they have."""
        said = await asyncio.to_thread(verdict.read)
        if said is None:
            return False
        if not self._verdict_is_told:
            self._verdict_is_told = True
            await self._journal.event("preflight", attempt=self._number, **verdict.as_event(said))
        return True


def not_begun(error: RunError | OSError) -> AttemptEnd:
    """An attempt of which nothing could be started."""
    return AttemptEnd(outcome="failed", failure=Failure(kind="starter", message=str(error), has_begun=False))


async def _lost_before_start(attempt: Attempt) -> HostLost | None:
    """The host whose agent has come and gone again, if that is why they are not all there."""
    with contextlib.suppress(TimeoutError):
        event = await asyncio.wait_for(attempt.next_event(), _EVENT_SECONDS)
        return event if isinstance(event, HostLost) else None
    return None


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
