"""Watches the ranks of an attempt until the last has ended: the first that fails, a hang, or a stop ends all."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from cluster.fabric.watch.hang_findings import ranks_text
from launcher.first_cause import explains_itself, failed_at, failures, have_stopped, how_it_ended
from launcher.jobs.agents.head import Attempt, HostLost, RankEnded, StopHeard
from launcher.jobs.backend import Agents
from launcher.jobs.backends.starter import last_words
from launcher.jobs.job import Job
from launcher.jobs.stop_asked import StopAsked
from launcher.jobs.supervision.attempt_end import AttemptEnd, Failure
from launcher.jobs.supervision.first_failure import (
    Scene,
    StarterEnd,
    collective_of,
    first_failure,
    missed_ranks,
    of_hang,
    of_preflight,
)
from launcher.jobs.supervision.hang_tail import Hang, HangTail, watched_ranks
from launcher.jobs.supervision.preflight_verdict import PreflightVerdict
from launcher.jobs.supervision.progress import last_step, newest_checkpoint
from launcher.jobs.supervision.stopping import Stopping
from launcher.rank_process import EXIT_STOPPED
from launcher.verb import EXIT_REFUSED

_RESULT_NAME = "result.json"
# For what has been told to the head to come here.
_SETTLE_SECONDS = 1.0
# After the head has given up a host that is out of reach: by then its agent has given up the head, and ended its ranks. They
# may be a few beats apart, and the agent's ranks may take five seconds to end.
_ISOLATED_SECONDS = 10.0

_News: TypeAlias = Callable[[], Awaitable[None]]


class RanksWatch:
    """The ranks of `attempt`; to be made before they start."""

    def __init__(
        self,
        job: Job,
        attempt: Attempt,
        agents: Agents,
        stop: StopAsked,
        stopping: Stopping,
        *,
        num_ranks: int,
        directory: Path,
        output: Path,
        verdict: PreflightVerdict | None,
    ) -> None:
        self._job = job
        self._attempt = attempt
        self._agents = agents
        self._stop = stop
        self._stopping = stopping
        self._num_ranks = num_ranks
        self._directory = directory
        self._output = output
        self._verdict = verdict
        self._began = time.time()
        self._hangs = HangTail(
            job.run,
            patience_s=job.launch.end_hangs_after_seconds,
            hang_seconds=job.config.fabric.hang_seconds,
        )
        self._news: asyncio.Queue[_News] = asyncio.Queue()
        self._open = set(range(num_ranks))
        self._ended: dict[int, RankEnded] = {}
        self._lost: list[HostLost] = []
        self._ranks_are_told = asyncio.Event()
        self._starter: StarterEnd | None = None
        self._hang: Hang | None = None
        self._result: Mapping[str, Any] | None = None
        """What rank 0 says of the run, once that is done."""
        self._scene: Scene | None = None
        self._failed_at = 0.0
        """By the monotonic clock: when the first failure was seen."""
        self._end_at = math.inf
        """By the event loop's clock: when ranks that still run are ended."""
        self._grace_s = job.patience.terminated
        self._is_ending = False

    async def until_all_have_ended(self) -> AttemptEnd:
        """Returns once no rank runs any more, as far as hosts can be reached."""
        async with asyncio.TaskGroup() as group:
            sources = (
                self._hear_head(),
                self._hear_starter(),
                self._hear_stop(),
                self._hear_stop_of_ranks(),
                self._hear_interrupt(),
                self._look(),
            )
            tasks = [group.create_task(source) for source in sources]
            while self._open:
                try:
                    async with asyncio.timeout_at(None if self._end_at == math.inf else self._end_at):
                        news = await self._news.get()
                except TimeoutError:
                    if self._is_ending:
                        break
                    self._is_ending, self._end_at = True, math.inf
                    tasks.append(group.create_task(self._end_ranks()))
                else:
                    await news()
            for task in tasks:
                task.cancel()
        await self._hear_watch_out()
        end = await asyncio.to_thread(self._find_end)
        silent_since = max((lost.at for lost in self._lost if lost.silent), default=-_ISOLATED_SECONDS)
        return replace(end, clear_at=silent_since + _ISOLATED_SECONDS)

    async def _hear_watch_out(self) -> None:
        """The watch of the run outlives its ranks by seconds, and tells in which collective one that is gone is missed."""
        gone = {rank for lost in self._lost for rank in lost.ranks}
        failed = await asyncio.to_thread(self._failed_ranks)
        gone |= {end.rank for end in failed if end.record is None and not end.ended_by_us}
        is_watched = self._scene is not None and bool(self._scene.doing)
        deadline = self._failed_at + self._job.patience.watch
        while is_watched and gone and time.monotonic() < deadline:
            await asyncio.to_thread(self._hangs.look)
            if any(gone & set(finding.ranks) for finding in self._hangs.told):
                return
            await asyncio.sleep(self._job.patience.look)

    def _end_within(self, seconds: float) -> None:
        if not self._is_ending:
            self._end_at = min(self._end_at, asyncio.get_running_loop().time() + seconds)

    async def _end_ranks(self) -> None:
        await self._attempt.end_ranks(self._grace_s)
        self._end_at = asyncio.get_running_loop().time() + _SETTLE_SECONDS
        self._news.put_nowait(_nothing)

    async def _hear_head(self) -> None:
        while True:
            event = await self._attempt.next_event()
            match event:
                case StopHeard():
                    self._ranks_are_told.set()
                case HostLost():
                    self._news.put_nowait(partial(self._on_lost, event))
                case RankEnded():
                    self._news.put_nowait(partial(self._on_end, event))

    async def _hear_starter(self) -> None:
        code = await self._agents.wait()
        words = await asyncio.to_thread(last_words, self._output)
        end = StarterEnd(at=time.time(), code=code, words=words, backend=self._job.backend.name)
        self._news.put_nowait(partial(self._on_starter, end))

    async def _hear_stop(self) -> None:
        await self._stop.asked.wait()
        self._news.put_nowait(self._on_stop)
        await self._stopping.until_saves_are_over()
        self._news.put_nowait(self._on_saves_over)

    async def _hear_stop_of_ranks(self) -> None:
        """The scheduler may tell the ranks, and not this process."""
        await self._ranks_are_told.wait()
        await self._stopping.until_saves_are_over()
        self._news.put_nowait(self._on_saves_over)

    async def _hear_interrupt(self) -> None:
        await self._stop.at_once.wait()
        self._news.put_nowait(self._on_interrupt)

    async def _look(self) -> None:
        """Looks for hangs. Files may be slow, and so are read in a thread."""
        while True:
            await asyncio.sleep(self._job.patience.look)
            hang = await asyncio.to_thread(self._hangs.look)
            if hang is not None:
                self._news.put_nowait(partial(self._on_hang, hang))
                return

    async def _on_end(self, end: RankEnded) -> None:
        self._ended[end.rank] = end
        self._open.discard(end.rank)
        patience = self._job.patience
        if end.code == EXIT_STOPPED:
            self._end_within(self._job.launch.save_seconds)
        elif end.code == 0:
            if end.rank == 0:  # of others it is not known yet whether that is too early
                self._result = await self._find_result()
                if self._result is not None:
                    self._end_within(patience.done)
                else:
                    await self._on_failure(patience.own_end)
        elif not end.ended_by_us:
            refused = end.code == EXIT_REFUSED and await asyncio.to_thread(self._refusal) is not None
            killed = end.code < 0 and end.record is None
            await self._on_failure(0.0 if refused else patience.known_cause if killed else patience.own_end)

    async def _on_lost(self, lost: HostLost) -> None:
        if lost.ranks:  # else nothing was lost with it
            self._lost.append(lost)
            self._open -= set(lost.ranks)
            await self._on_failure(self._job.patience.known_cause)

    async def _on_starter(self, end: StarterEnd) -> None:
        if not self._is_ending:
            self._starter = end
            await self._on_failure(self._job.patience.starter)

    async def _on_failure(self, seconds: float) -> None:
        if self._scene is None:
            self._failed_at = time.monotonic()
            # Now, while the watch knows what the ranks were doing.
            self._scene = await asyncio.to_thread(self._look_at_scene)
        self._end_within(seconds)

    async def _on_hang(self, hang: Hang) -> None:
        # Once all is trained ranks may be gone while rank 0 still exports.
        is_over = hang.finding.evidence.get("state") == "dead" and await asyncio.to_thread(self._has_trained)
        if self._stop.signal is None and not self._is_ending and not is_over:
            self._hang = hang
            self._grace_s = 0.0  # who hangs does not listen
            await self._on_failure(0.0)

    async def _on_stop(self) -> None:
        number = self._stop.signal
        assert number is not None
        self._attempt.signal(signal.SIGTERM if number == signal.SIGHUP else number)

    async def _on_saves_over(self) -> None:
        self._end_within(0.0)

    async def _on_interrupt(self) -> None:
        self._grace_s = 0.0
        self._end_within(0.0)

    def _refusal(self) -> Mapping[str, Any] | None:
        return None if self._verdict is None else self._verdict.refusal()

    def _look_at_scene(self) -> Scene:
        ranks = watched_ranks(self._job.run.root, since=self._began)
        return Scene(
            num_ranks=self._num_ranks,
            logs=self._directory,
            step=last_step(self._job.run, since=self._began),
            doing={number: rank.doing for number, rank in ranks.items()},
        )

    def _find_end(self) -> AttemptEnd:
        """How all this is to be understood."""
        ended = list(self._ended.values())
        if self._result is not None:
            self._tell_late_failures()
            return AttemptEnd(outcome="finished", result=self._result)
        failed = self._failed_ranks()
        scene = self._scene or self._look_at_scene()
        first = self._ended.get(0)
        if first is not None and first.code == EXIT_REFUSED and (refusal := self._refusal()) is not None:
            missed = self._why_missed(missed_ranks(refusal), failed, scene)
            return _failed(missed or of_preflight(refusal, at=failed_at(first)))
        if self._hang is not None and not any(
            end.rank in self._hang.finding.ranks and not end.ended_by_us for end in failed
        ):
            return _failed(of_hang(self._hang, scene))
        if have_stopped(ended, was_asked=self._stop.signal is not None) and not any(end.code == 0 for end in failed):
            return AttemptEnd(outcome="stopped")
        caused = self._lost or self._starter or any(map(explains_itself, failed))
        if self._stop.signal is not None and not caused:
            return AttemptEnd(outcome="stopped", saved=False)
        silence_s = self._job.launch.lost_host_seconds
        failure = first_failure(failed, self._lost, self._starter, self._with_findings(scene), silence_s=silence_s)
        assert failure is not None, "ranks are ended for a reason"
        return _failed(failure)

    def _failed_ranks(self) -> list[RankEnded]:
        """With those that ended as if all were done (0), and it is not: rank 0 is once it has left the run's result, the others
        once all is trained."""
        failed = failures(self._ended.values())
        if self._result is None:
            has_trained = self._has_trained()
            failed += [end for end in self._ended.values() if end.code == 0 and (end.rank == 0 or not has_trained)]
        return failed

    def _has_trained(self) -> bool:
        """Whether the last step is made and saved: rank 0 may go on alone, with the export."""
        return newest_checkpoint(self._job.run) >= self._job.config.train.steps

    def _why_missed(self, missed: frozenset[int], failed: Sequence[RankEnded], scene: Scene) -> Failure | None:
        """Of ranks that did not answer preflight: how they ended, where they did so by themselves, as by a crash that has
        nothing to do with their host."""
        ended = [end for end in failed if end.rank in missed and explains_itself(end)]
        lost = [host for host in self._lost if not missed.isdisjoint(host.ranks)]
        return first_failure(ended, lost, None, scene, silence_s=self._job.launch.lost_host_seconds)

    def _with_findings(self, scene: Scene) -> Scene:
        """Of ranks that the watch has named it also knows the collective in which they are missed."""
        named = {
            rank: collective
            for finding in reversed(self._hangs.told)
            if (collective := collective_of(finding))
            for rank in finding.ranks
        }
        return replace(scene, doing={**scene.doing, **named})

    def _tell_late_failures(self) -> None:
        """Ranks that did not end well after rank 0 had done all. Nothing is lost with them."""
        if stuck := sorted(end.rank for end in self._ended.values() if end.ended_by_us):
            seconds = self._job.patience.done
            self._job.say(
                f"{ranks_text(stuck)} had not ended {seconds:g} s after rank 0 was done, and had to be ended; nothing is lost"
            )
        for end in failures(self._ended.values()):
            if explains_itself(end):
                self._job.say(
                    f"rank {end.rank} on {end.host}{how_it_ended(end)}, after rank 0 was done; nothing is lost"
                )

    async def _find_result(self) -> Mapping[str, Any] | None:
        """What rank 0 has left of the run; None where it has ended without."""
        deadline = time.monotonic() + self._job.patience.result
        while (result := await asyncio.to_thread(self._read_result)) is None and time.monotonic() < deadline:
            await asyncio.sleep(self._job.patience.look)
        return result

    def _read_result(self) -> Mapping[str, Any] | None:
        with contextlib.suppress(OSError, ValueError):
            result: Mapping[str, Any] = json.loads((self._directory / _RESULT_NAME).read_text(encoding="utf-8"))
            return result
        return None


def _failed(failure: Failure) -> AttemptEnd:
    return AttemptEnd(outcome="failed", failure=failure)


async def _nothing() -> None:
    """Wakes the loop."""
