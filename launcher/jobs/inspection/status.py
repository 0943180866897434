"""How runs are: what `mega status` says, of those that a supervisor cares for and of those that `mega train` has started."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from launcher.event_words import duration, event_words
from launcher.jobs.inspection.run_facts import RunFacts, first_failure_record, look_at
from launcher.jobs.job_record import JobState
from launcher.jobs.slurm.squeue import QueuedJob, jobs_in_queue
from megamodel.train.run_directory import RunDirectory

SILENT_SECONDS = 30.0
"""A supervisor that lives writes its state every few seconds."""
_QUIET_SECONDS = 10.0
"""After which SLURM's queue is asked: a job that is not in it has no supervisor."""
_FRESH_SECONDS = 120.0
"""Where a file system has no locks, a run that has written nothing for so long, or for ten of its steps, does not train."""
UNCONFIRMED = "SLURM has not confirmed the job: the same `mega launch` finds it, or submits it"

AskQueue = Callable[[Sequence[str]], Mapping[str, QueuedJob] | None]


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One run as it is now."""

    name: str
    directory: str
    state: JobState
    cause: str | None
    """Why it failed or was stopped; while it goes on, why its last attempt ended."""
    step: int
    total_steps: int | None
    loss: float | None
    tokens_per_s: float | None
    mfu: float | None
    eta_s: float | None
    """Seconds to the last step, at the pace of the last steps; None where it does not train now."""
    restarts: int
    """Starts after the first."""
    attempt: int
    backend: str | None
    """Who started it by `mega launch`: local, slurm, mpi, torchrun; None for `mega train`."""
    job_id: str | None
    hosts: tuple[str, ...]
    excluded_hosts: tuple[str, ...]
    excluded_because: Mapping[str, str] = field(default_factory=dict)
    """Host to reason."""
    last_event: str | None
    """In words."""
    last_event_age_s: float | None
    queue_reason: str | None = None
    """Why it waits in SLURM's queue, where it does."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come of it by itself."""
        return self.state in ("finished", "failed")

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Verdict:
    state: JobState
    cause: str | None = None
    queue_reason: str | None = None


def run_status(run: RunDirectory, *, ask_queue: AskQueue = jobs_in_queue) -> RunStatus:
    """Of one run. Changes nothing, and raises for no file that is torn or damaged."""
    return run_statuses([run], ask_queue=ask_queue)[0]


def run_statuses(
    runs: Sequence[RunDirectory], *, now: float | None = None, ask_queue: AskQueue = jobs_in_queue
) -> list[RunStatus]:
    """Of several, in their order. The queue is asked once, and only where files do not tell. `now` in seconds since 1970."""
    moment = time.time() if now is None else now
    looks = [look_at(run) for run in runs]
    unclear = [facts.record.job_id for facts in looks if _queue_knows(facts, moment) and facts.record is not None]
    queue = ask_queue([job_id for job_id in unclear if job_id is not None]) if unclear else None
    return [_status(facts, _judge(facts, queue, moment), moment) for facts in looks]


def _status(facts: RunFacts, verdict: _Verdict, now: float) -> RunStatus:
    pace, state = facts.pace, facts.state if not _is_plain(facts) else None
    last = facts.events[-1] if facts.events else None
    excluded = {} if _is_plain(facts) else facts.excluded_hosts
    eta = None
    if verdict.state == "running" and pace.step_s is not None and facts.total_steps is not None:
        since = 0.0 if pace.time is None else max(0.0, now - pace.time)
        eta = max(0.0, pace.step_s * (facts.total_steps - pace.step) - min(since, pace.step_s))
    begin = facts.last("begin") or {}
    return RunStatus(
        name=facts.run.root.name,
        directory=str(facts.run.root),
        state=verdict.state,
        cause=verdict.cause,
        step=pace.step,
        total_steps=facts.total_steps,
        loss=pace.loss,
        tokens_per_s=pace.tokens_per_s,
        mfu=pace.mfu,
        eta_s=eta,
        restarts=state.restarts if state is not None else max(0, facts.num_starts - 1),
        attempt=state.attempt if state is not None else facts.attempt,
        backend=facts.record.backend if facts.record is not None else None,
        job_id=facts.record.job_id if facts.record is not None else None,
        hosts=state.hosts if state is not None else (str(begin["host"]),) if "host" in begin else (),
        excluded_hosts=tuple(excluded),
        excluded_because=dict(excluded),
        last_event=None if last is None else event_words(last),
        last_event_age_s=None if last is None else max(0.0, now - last["time"]),
        queue_reason=verdict.queue_reason,
    )


def _judge(facts: RunFacts, queue: Mapping[str, QueuedJob] | None, now: float) -> _Verdict:
    if _is_plain(facts):
        return _judge_plain(facts, now)
    if facts.state is None:
        return _judge_waiting(facts, queue, now)
    state = facts.state
    in_slurm = queue is not None and facts.record is not None and facts.record.job_id is not None
    limit = _QUIET_SECONDS if in_slurm else SILENT_SECONDS
    if state.state in ("finished", "failed") or not _is_silent(facts, now, limit):
        return _Verdict(state=state.state, cause=state.cause)
    job = _job_of(facts, queue)
    if job is not None:
        if not job.waits and not _is_silent(facts, now):
            return _Verdict(state=state.state, cause=state.cause)
        waiting: JobState = "queued" if state.state == "queued" or not state.attempt else "restarting"
        return _Verdict(
            state=waiting if job.waits else "running", cause=state.cause, queue_reason=job.reason if job.waits else None
        )
    if queue is None and facts.record is not None and facts.record.job_id and state.state == "queued":
        return _Verdict(
            state="queued", cause=state.cause
        )  # it waits to be started again, and only the queue knows more
    if facts.is_held or (facts.is_held is None and _writes(facts, now)):
        return _Verdict(
            state=state.state, cause=state.cause
        )  # it lives, and cannot write: a full disk, a slow file system
    silence = duration(now - (facts.heard or now))
    before = f"; before that: {state.cause}" if state.cause else ""
    gone = f", and job {facts.record.job_id} is gone" if queue is not None and facts.record is not None else ""
    saved = facts.last("checkpoint")
    mend = "launch it again" + (f": it goes on from step {saved.get('step')}" if saved is not None else "")
    return _Verdict(
        state="failed",
        cause=f"its supervisor on {state.host} has not been heard of for {silence}{gone}{before}; {mend}",
    )


def _judge_waiting(facts: RunFacts, queue: Mapping[str, QueuedJob] | None, now: float) -> _Verdict:
    """A job whose supervisor has not begun."""
    assert facts.record is not None
    record = facts.record
    waits_for = duration(now - record.submitted)
    if record.job_id is not None:
        job = _job_of(facts, queue)
        if job is not None:
            return _Verdict(state="queued", queue_reason=job.reason or None)
        if queue is None or now - record.submitted < SILENT_SECONDS:  # nobody knows better, or knows it yet
            return _Verdict(state="queued")
        where = f"job {record.job_id} is not in the queue any more, and its supervisor never began"
    elif record.backend == "slurm":
        return _Verdict(state="queued", queue_reason=UNCONFIRMED)
    elif now - record.submitted < SILENT_SECONDS:
        return _Verdict(state="queued")
    else:
        where = f"its supervisor never began, {waits_for} after it was launched on {record.submitted_from}"
    return _Verdict(state="failed", cause=f"{where}; {facts.run.root}/launch/supervisor.log may say why")


def _judge_plain(facts: RunFacts, now: float) -> _Verdict:
    """A run of `mega train`, which leaves nobody behind to tell of it."""
    if facts.is_held:
        return _Verdict(state="running")
    last = facts.last("begin", "start", "resume", "end", "stop", "failure", "finished")
    name = last["event"] if last is not None else None
    if name in ("end", "finished"):
        return _Verdict(state="finished")
    if last is not None and name in ("stop", "failure"):
        return _Verdict(state="failed", cause=str(last.get("message") or event_words(last)))
    if facts.is_held is None and _writes(facts, now):
        return _Verdict(state="running")
    first = first_failure_record(facts)
    if first is not None:
        return _Verdict(state="failed", cause=f"rank {first[0]}: {first[1].message}")
    where = f"after step {facts.pace.step}" if facts.pace.step else "before its first step"
    return _Verdict(
        state="failed", cause=f"it ended without a word {where}; the same command continues from the last checkpoint"
    )


def _writes(facts: RunFacts, now: float) -> bool:
    """Whether training has written anything of late."""
    written = max((moment for moment in (facts.pace.time, facts.started) if moment is not None), default=0.0)
    return now - written < max(_FRESH_SECONDS, 10 * (facts.pace.step_s or 0.0))


def _is_plain(facts: RunFacts) -> bool:
    """Whether `mega train`, or torchrun with it, has started it last, and no supervisor."""
    if facts.record is None:
        return True
    started = facts.started or 0.0
    if facts.state is None:
        return facts.is_held is True or started > facts.record.submitted
    since = facts.state.updated
    if facts.state.state not in ("finished", "failed"):
        since += SILENT_SECONDS
    return started > since


def _is_silent(facts: RunFacts, now: float, seconds: float = SILENT_SECONDS) -> bool:
    return facts.heard is None or now - facts.heard > seconds


def _queue_knows(facts: RunFacts, now: float) -> bool:
    """Whether SLURM's queue may tell what the files do not."""
    if _is_plain(facts) or facts.record is None or facts.record.job_id is None:
        return False
    if facts.state is None:
        return True
    return facts.state.state not in ("finished", "failed") and _is_silent(facts, now, _QUIET_SECONDS)


def _job_of(facts: RunFacts, queue: Mapping[str, QueuedJob] | None) -> QueuedJob | None:
    if queue is None or facts.record is None or facts.record.job_id is None:
        return None
    return queue.get(facts.record.job_id)
