"""The supervisor of a job: attempt after attempt, until the run is done, has stopped, or cannot go on.

It goes on from the last complete checkpoint after a crash, a hang or a lost host, on spare hosts or on fewer where the
configuration allows that, and gives up when attempts in a row leave no new checkpoint. All that it must know after another
start of the job stands in `runs/<name>/launch/state.json`.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

from launcher.config import load_run_config
from launcher.errors import ConfigError, RunError
from launcher.jobs.agents.head import Head
from launcher.jobs.host_choice import choose_hosts
from launcher.jobs.job import Job, JobEnd
from launcher.jobs.job_record import SupervisorState
from launcher.jobs.journal import Journal
from launcher.jobs.stop_asked import StopAsked
from launcher.jobs.supervision.attempt_end import AttemptEnd, Failure
from launcher.jobs.supervision.attempt_run import AttemptRun, not_begun
from launcher.jobs.supervision.decision import decide, without_progress
from launcher.jobs.supervision.first_state import first_state
from launcher.jobs.supervision.host_lack import host_count, not_there
from launcher.jobs.supervision.progress import newest_checkpoint
from launcher.jobs.supervision.stopping import Stopping, StopReason
from launcher.rank_process import EXIT_INTERRUPTED, EXIT_STOPPED
from launcher.run_record import new_attempt

_CONTINUE = "the same command continues"


async def supervise(job: Job, *, stop: StopAsked | None = None) -> JobEnd:
    """Runs the job to its end; returns how it ended. Hears stop signals, where nobody else does (`stop`): to be run in the
    main thread, by the process that holds the run's lock. Nothing of the job runs any more when it returns or raises, as far
    as hosts can be reached."""
    job = replace(job, say=partial(_say_if_read, job.say))
    first = await asyncio.to_thread(first_state, job)
    journal = Journal(job.run, first.state, say=job.say)
    hearing = StopAsked(job.say) if stop is None else contextlib.nullcontext(stop)
    with contextlib.closing(journal), hearing as stop:
        alive = asyncio.ensure_future(journal.keep_alive())
        try:
            async with Head(token=secrets.token_hex(16), silence_s=job.launch.lost_host_seconds, say=job.say) as head:
                return await _Supervisor(job, head, journal, stop).run(first.loss)
        except Exception as error:
            await journal.update(state="failed", cause=f"the supervisor itself failed: {error}", hosts=())
            raise
        finally:
            alive.cancel()
            await asyncio.gather(alive, return_exceptions=True)


def _say_if_read(say: Callable[[str], None], text: str) -> None:
    """A terminal that is gone ends no job: what it would have shown stands in the events."""
    with contextlib.suppress(OSError):
        say(text)


class _Supervisor:
    def __init__(self, job: Job, head: Head, journal: Journal, stop: StopAsked) -> None:
        self._job = job
        self._head = head
        self._journal = journal
        self._stop = stop
        self._stopping = Stopping(job, journal, stop)
        self._losses: Counter[str] = Counter()
        """Of each host: attempts in a row, of those that it was part of, in which it was lost."""
        self._last_failure: Failure | None = None
        self._hosts_unknown: str | None = None
        """Why nobody knows which hosts are there."""
        self._fitting: dict[int, bool] = {}

    @property
    def _state(self) -> SupervisorState:
        return self._journal.state

    async def run(self, loss: Failure | None) -> JobEnd:
        """`loss`: of the supervisor before, from which this one takes over."""
        try:
            return await self._run(loss)
        finally:
            await self._stopping.close()

    async def _run(self, loss: Failure | None) -> JobEnd:
        """Attempt after attempt."""
        if loss is not None:
            await self._journal.event("failure", attempt=self._state.attempt, **loss.as_event())
        await self._begin()
        if await self._stopping.is_cancelled():  # while it was queued
            return await self._end_stopped(AttemptEnd(outcome="stopped"), "cancel")
        if self._state.attempts_without_progress >= self._job.launch.max_attempts_without_progress:
            return await self._give_up(without_progress(self._state.cause or "", self._state.attempts_without_progress))
        while True:
            hosts = await self._wait_for_hosts()
            if self._stop.signal is not None:
                return await self._end_stopped(AttemptEnd(outcome="stopped"), await self._stopping.why())
            if not hosts:
                return await self._end_without_hosts()
            end = await self._attempt(hosts)
            if end.outcome == "finished":
                return await self._finish(end)
            if end.outcome == "stopped" or self._stop.signal is not None:
                return await self._end_stopped(end, await self._stopping.why())
            assert end.failure is not None
            if (job_end := await self._after_failure(end.failure, hosts, clear_at=end.clear_at)) is not None:
                return job_end

    async def _begin(self) -> None:
        record = await asyncio.to_thread(self._job.folder.read_record)
        await self._journal.event(
            "launch",
            backend=self._job.backend.name,
            job_id=None if record is None else record.job_id,
            submitted=None if record is None else record.submitted,
            nodes=self._job.launch.nodes,
            host=self._state.host,
        )
        await self._journal.update()

    async def _wait_for_hosts(self) -> tuple[str, ...]:
        """The hosts of the next attempt; none where too few come within the time for that, or a stop is asked."""
        deadline = time.monotonic() + self._job.launch.wait_for_hosts_seconds
        is_told, cause = False, self._state.cause
        while True:
            available = await self._available()
            if chosen := self._choose(available):
                if is_told:
                    await self._journal.update(cause=cause)
                return chosen
            # Where even that is not known now, it may be in a while.
            can_come_back = (possible := await self._possible()) is None or bool(self._choose(possible))
            if not can_come_back or time.monotonic() >= deadline:
                return ()
            if not is_told:
                is_told = True
                need = self._job.launch.fewest_nodes
                await self._journal.event("wait_for_hosts", have=len(available), need=need)
                seconds, lack = self._job.launch.wait_for_hosts_seconds, await self._lack("there", available)
                await self._journal.update(cause=f"waiting for hosts: {lack}")
                self._job.say(f"{lack}: waiting up to {seconds:g} s for others")
            if await self._stop.sleep(self._job.patience.hosts):
                return ()

    async def _available(self) -> tuple[str, ...]:
        """Hosts that are there, without those that are not used any more."""
        try:
            hosts, unknown = tuple(await self._job.backend.hosts()), None
        except RunError as error:  # the scheduler may answer the next time
            hosts, unknown = (), f"hosts are not known: {error}"
        if unknown is not None and unknown != self._hosts_unknown:
            self._job.say(unknown)
        self._hosts_unknown = unknown
        return tuple(host for host in hosts if host not in self._state.excluded_hosts)

    async def _lack(self, where: str, available: Sequence[str]) -> str:
        """How many hosts there are, and who is missing, or why that is not known."""
        count = host_count(len(available), where, self._job.launch)
        if self._hosts_unknown is not None:
            return f"{count}; {self._hosts_unknown}"
        here = {*available, *self._state.excluded_hosts}
        missing = [host for host in await self._possible() or () if host not in here]
        return count + await not_there(self._job.backend.name, missing)

    async def _possible(self) -> tuple[str, ...] | None:
        """Hosts that are there or may come back; None where nobody knows."""
        try:
            return tuple(await self._job.backend.possible_hosts())
        except RunError:
            return None

    def _choose(self, available: Collection[str], without: str | None = None) -> tuple[str, ...]:
        failure, launch = self._last_failure, self._job.launch
        lost = failure.lost_hosts if failure is not None else ()
        host = failure.host if failure is not None else None
        return choose_hosts(
            [each for each in available if each not in self._state.excluded_hosts and each != without],
            nodes=launch.nodes,
            fewest=launch.fewest_nodes,
            fits=self._fits,
            doubtful={*lost, *([host] if host is not None else [])},
            missing=lost if failure is not None and failure.are_missing else (),
        )

    def _fits(self, num_hosts: int) -> bool:
        """Whether the run can be laid out on so many hosts."""
        if num_hosts not in self._fitting:
            try:
                load_run_config([self._job.config_file], num_ranks=num_hosts * self._job.ranks_per_host)
                self._fitting[num_hosts] = True
            except ConfigError:
                self._fitting[num_hosts] = False
        return self._fitting[num_hosts]

    async def _attempt(self, hosts: Sequence[str]) -> AttemptEnd:
        try:
            directory = await asyncio.to_thread(new_attempt, self._job.run)
        except OSError as error:
            return not_begun(error)
        number = int(directory.name.removeprefix("attempt-"))
        is_restart = self._state.attempt > 0
        num_ranks = len(hosts) * self._job.ranks_per_host
        if is_restart:
            await self._journal.event(
                "restart", attempt=number, reason=self._state.cause or "the job was started again"
            )
        await self._journal.event("attempt", attempt=number, hosts=hosts, num_ranks=num_ranks, restart=is_restart)
        restarts = self._state.restarts + is_restart
        await self._journal.update(attempt=number, restarts=restarts, hosts=tuple(hosts))
        self._job.say(f"attempt {number}: {num_ranks} ranks on {', '.join(hosts)}; logs: {directory}")
        run = AttemptRun(
            self._job,
            head=self._head,
            journal=self._journal,
            stop=self._stop,
            stopping=self._stopping,
            number=number,
            directory=directory,
            hosts=hosts,
        )
        try:
            return await run.run()
        except (RunError, OSError) as error:
            return not_begun(error)
        finally:
            await self._journal.update(hosts=())

    async def _after_failure(self, failure: Failure, hosts: Sequence[str], *, clear_at: float) -> JobEnd | None:
        """Writes down what has failed, and decides; the job's end where there is to be no other attempt."""
        self._last_failure = failure
        for host in hosts:
            self._losses[host] = self._losses[host] + 1 if host in failure.lost_hosts else 0
        newest = await asyncio.to_thread(newest_checkpoint, self._job.run, known=self._state.last_checkpoint)
        possible = await self._possible()
        decision = decide(
            failure,
            launch=self._job.launch,
            attempts_without_progress=self._state.attempts_without_progress,
            has_progressed=newest > self._state.last_checkpoint,
            losses=self._losses,
            can_do_without=lambda host: bool(self._choose(possible or (), without=host)),
            least_delay_s=0.0 if failure.has_begun else self._job.patience.not_begun,
        )
        await self._journal.event("failure", attempt=self._state.attempt, **failure.as_event())
        for host, reason in decision.exclude.items():
            await self._journal.event("exclude", host=host, reason=reason)
            self._job.say(f"{host} is not used any more: {reason}")
        await self._journal.update(
            state="restarting",  # a job that has ended says so once, when nothing more is written
            cause=decision.cause,
            attempts_without_progress=decision.attempts_without_progress,
            last_checkpoint=newest,
            excluded_hosts={**self._state.excluded_hosts, **decision.exclude},
        )
        if failure.traceback:
            self._job.say(failure.traceback.rstrip())
        log = f"; its log: {failure.log}" if failure.log is not None else ""
        if not decision.restarts:
            return await self._give_up(decision.cause, decision.exit_code, log)
        delay_s = max(decision.delay_s, clear_at - time.time())
        delay = f" in {round(delay_s, 1):g} s" if delay_s > 0 else ""
        self._job.say(f"{failure.message}{log}; going on from step {newest}{delay}")
        await self._stop.sleep(delay_s)
        return None

    async def _give_up(self, cause: str, exit_code: int = 1, log: str = "") -> JobEnd:
        await self._journal.event("give_up", cause=cause)
        await self._journal.update(state="failed", cause=cause)
        self._job.say(f"giving up: {cause}{log}")
        return JobEnd(exit_code=exit_code, cause=cause)

    async def _end_without_hosts(self) -> JobEnd:
        """Asks for another start of the job on other hosts, or ends it."""
        lack = await self._lack("left", await self._available())
        reasons = [f"{host}: {reason}" for host, reason in self._state.excluded_hosts.items()]
        not_used = f"; not used any more: {'; '.join(reasons)}" if reasons else ""
        after = f"; before that: {self._last_failure.message}" if self._last_failure is not None else ""
        cause = f"{lack}{not_used}{after}"
        if await self._stopping.requeue("hosts", cause):
            return JobEnd(exit_code=EXIT_STOPPED, cause=cause, requeued=True)
        return await self._give_up(cause, 1 if self._last_failure is None else self._last_failure.exit_code)

    async def _finish(self, end: AttemptEnd) -> JobEnd:
        newest = await asyncio.to_thread(newest_checkpoint, self._job.run, known=self._state.last_checkpoint)
        await self._journal.event("done")
        await self._journal.update(state="finished", cause=None, attempts_without_progress=0, last_checkpoint=newest)
        self._job.say(f"the run has finished; its newest checkpoint is of step {newest}")
        return JobEnd(exit_code=0, result=end.result)

    async def _end_stopped(self, end: AttemptEnd, reason: StopReason) -> JobEnd:
        """Asks for another start where the scheduler wants its hosts back; else the job ends here."""
        newest = await asyncio.to_thread(newest_checkpoint, self._job.run, known=self._state.last_checkpoint)
        # To be preempted is nobody's fault. A job that saves nothing until its time is over never will.
        is_queued = self._stopping.is_counted
        count = self._state.attempts_without_progress + (reason == "time_limit" and not is_queued)
        count = 0 if newest > self._state.last_checkpoint else count
        is_saved = end.outcome == "stopped" and end.saved
        if is_saved:
            how = f"saved at step {newest}: {_CONTINUE}" if newest else f"nothing was trained yet: {_CONTINUE}"
        elif end.failure is not None:
            how = f"{end.failure.message}; {_CONTINUE} from step {newest}"
            await self._journal.event("failure", attempt=self._state.attempt, **end.failure.as_event())
        else:
            how = f"ended before a checkpoint was saved; {_CONTINUE} from step {newest}"
        cause = f"{self._stopping.who(reason)}; {how}"
        await self._journal.update(cause=cause, attempts_without_progress=count, last_checkpoint=newest)
        # One that is queued already gives up when it begins.
        if reason == "time_limit" and not is_queued and count >= self._job.launch.max_attempts_without_progress:
            return await self._give_up(without_progress(cause, count))
        if reason in ("preemption", "time_limit"):
            if await self._stopping.requeue(reason, cause):
                return JobEnd(exit_code=EXIT_STOPPED, cause=cause, requeued=True)
            if await self._stopping.is_cancelled():
                cause = f"{self._stopping.who('cancel')}; {how}"
        await self._journal.update(state="failed", cause=cause)
        self._job.say(cause)
        interrupted = EXIT_INTERRUPTED if self._stop.at_once.is_set() else 1
        return JobEnd(exit_code=EXIT_STOPPED if is_saved else interrupted, cause=cause)
