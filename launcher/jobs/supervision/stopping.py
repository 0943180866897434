"""A job that is told to stop: why, how long its ranks may save, and the scheduler's word that it starts again."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Literal, TypeVar

from launcher.errors import RunError
from launcher.jobs.job import Job
from launcher.jobs.journal import Journal
from launcher.jobs.stop_asked import StopAsked

StopReason = Literal["cancel", "preemption", "time_limit", "signal"]
T = TypeVar("T")

# Before the scheduler ends the job: for its controller, which may be busy, to queue it again. What it ends after that it gives
# a while (KillWait, 30 s by default), in which ranks still save.
_REQUEUE_SECONDS, _REQUEUE_SHARE = 20.0, 0.25
# A warning of the time limit may come so much before its time.
_EARLY_SECONDS = 60.0


class Stopping:
    """Within one start of `job`; to be used in the event loop that hears `stop`."""

    def __init__(self, job: Job, journal: Journal, stop: StopAsked) -> None:
        self._job = job
        self._journal = journal
        self._stop = stop
        self._told = asyncio.ensure_future(self._tell())
        self._requeuing: asyncio.Task[bool] | None = None
        self.is_counted = False
        """Whether the job was queued again while its ranks saved, and this start was counted as one without progress, as far as
        it is one."""

    async def close(self) -> None:
        """Waits for a stop no more."""
        self._told.cancel()
        await asyncio.gather(self._told, return_exceptions=True)

    async def why(self) -> StopReason:
        """Once ranks have stopped. The job may have been cancelled since the first signal came."""
        if self._stop.signal is None:
            await self._stop.sleep(self._job.patience.signal)
        reason = await self._reason()
        return "cancel" if await self.is_cancelled() else reason

    async def until_saves_are_over(self) -> None:
        """Once ranks are told to stop: returns when those that still save are to be ended. Where the scheduler is to start the
        job again it is asked for that before it ends the job, and ends those ranks itself."""
        began, launch = time.monotonic(), self._job.launch
        reason = await self._reason()
        if reason == "signal" and self._stop.signal is None:  # whoever told the ranks alone will see to them
            await _for_ever()
        over = launch.save_seconds
        if reason in ("preemption", "time_limit"):
            left = await self._time_left(reason)
            if left is not None:
                requeue_in = left - min(_REQUEUE_SECONDS, _REQUEUE_SHARE * left)
                over = max(over, time.monotonic() - began + requeue_in)
                await _sleep(requeue_in)
                if not await self.is_cancelled() and await self._requeue_while_ranks_save(reason):
                    await _for_ever()
        await _sleep(began + over - time.monotonic())

    async def is_cancelled(self) -> bool:
        """Whether `mega cancel` was called."""
        return await asyncio.to_thread(self._job.folder.is_cancelled)

    def who(self, reason: StopReason) -> str:
        """In words."""
        name = "a signal to its ranks" if self._stop.signal is None else self._stop.signal.name
        return {
            "cancel": "cancelled",
            "preemption": "preempted",
            "time_limit": f"stopped before its time limit ({name})",
            "signal": f"stopped by {name}",
        }[reason]

    async def requeue(self, reason: str, cause: str) -> bool:
        """Asks the scheduler, once, for another start of the job; returns whether it agrees."""
        if self._requeuing is None:
            self._requeuing = asyncio.create_task(self._requeue(reason, cause))
        return await asyncio.shield(self._requeuing)

    async def _tell(self) -> StopReason:
        """Waits for a stop signal; its reason."""
        await self._stop.asked.wait()
        assert self._stop.signal is not None
        reason = await self._find_reason()
        await self._journal.event("stop_asked", signal=self._stop.signal.name, reason=reason)
        return reason

    async def _reason(self) -> StopReason:
        return await (self._find_reason() if self._stop.signal is None else asyncio.shield(self._told))

    async def _find_reason(self) -> StopReason:
        if await self.is_cancelled():
            return "cancel"
        if self._stop.signal == signal.SIGUSR1:
            return "time_limit"
        # Ranks may have been told to stop by the scheduler itself, before a signal came here.
        if self._stop.signal in (signal.SIGTERM, None) and await self._ask_scheduler(self._job.backend.is_preempted):
            return "preemption"
        return "signal"

    async def _time_left(self, reason: StopReason) -> float | None:
        """Seconds until the scheduler ends the job by force; inf where that is not known, None where it does not."""
        warned_s = float(self._job.config.slurm.signal_seconds) if reason == "time_limit" else math.inf
        try:
            async with asyncio.timeout(None if warned_s == math.inf else warned_s / 2):
                ends_at = await self._ask_scheduler(self._job.backend.ends_at)
        except TimeoutError:
            return warned_s / 2
        if ends_at is None:
            return None
        left = max(0.0, ends_at - time.time())
        # SIGUSR1 from somebody else may come at any time.
        return left if left <= warned_s + _EARLY_SECONDS else warned_s

    async def _requeue_while_ranks_save(self, reason: StopReason) -> bool:
        state = self._journal.state
        if not await self.requeue(reason, f"{self.who(reason)}; its ranks still saved when its time was over"):
            await self._journal.update(state=state.state, cause=state.cause)
            return False
        self.is_counted = True
        # This process may not live to write how the save ended. Nobody is lost then.
        count = state.attempts_without_progress + (reason == "time_limit")
        await self._journal.update(hosts=(), attempts_without_progress=count)
        return True

    async def _requeue(self, reason: str, cause: str) -> bool:
        without = tuple(self._journal.state.excluded_hosts)
        requeues = self._journal.state.requeues
        # Before it is asked for: the scheduler may end this process at once.
        await self._journal.update(state="queued", cause=cause, requeues=requeues + 1)
        if not await self._ask_scheduler(partial(self._job.backend.requeue, without=without, reason=reason)):
            await self._journal.update(requeues=requeues)
            return False
        await self._journal.event("requeue", reason=reason, without=without)
        self._job.say(f"{cause}; the job is queued again" + (f", without {', '.join(without)}" if without else ""))
        return True

    async def _ask_scheduler(self, ask: Callable[[], Awaitable[T]]) -> T | None:
        """Its answer. It may have none for minutes, above all when it stops many jobs at once: it is asked again, until this
        process is killed, the job is cancelled, or patience has an end; then None."""
        deadline, is_told = time.monotonic() + self._job.patience.scheduler, False
        while not await self.is_cancelled():
            try:
                return await ask()
            except RunError as error:
                is_over = time.monotonic() >= deadline or self._stop.at_once.is_set()
                if is_over or not is_told:
                    is_told = True
                    self._job.say(f"the scheduler does not answer{'' if is_over else ' and is asked again'}: {error}")
            if is_over:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.at_once.wait(), self._job.patience.scheduler_look)
        return None


async def _sleep(seconds: float) -> None:
    if seconds == math.inf:
        await _for_ever()
    await asyncio.sleep(max(0.0, seconds))


async def _for_ever() -> None:
    """Until this task is cancelled."""
    await asyncio.get_running_loop().create_future()
