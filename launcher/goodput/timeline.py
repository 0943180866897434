"""A run's records in the order of time, and what each says of the time before it.

The run is always in one phase, which is the category of time that nothing else is said of. An event ends a phase and begins
the next; a step says itself what its time was spent on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from launcher.goodput.account import Account, Category, microseconds
from launcher.goodput.starts import Failure, History

Record = Mapping[str, Any]

_TYPICAL_STEPS = 64
"""By so many steps after the first one it is known how long a step takes."""
_NO_WORD = "no word of its end"


class Timeline:
    """Fed with records in the order of time; `close` at their end. Times are in microseconds since 1970."""

    def __init__(self, begin: int, *, cost_of_step: Callable[[int], int]) -> None:
        """`begin`: nothing was before. `cost_of_step`: of a step, what was spent waiting for the slowest rank."""
        self.account = Account(begin)
        self.history = History()
        self._cost_of_step = cost_of_step
        self._phase: Category = "stopped"
        self._losing = 0
        """Within how many stretches of lost steps this is."""
        self._submitted = 0
        """When a job was, that has not begun since."""
        self._launched = 0
        """When the job that began last was submitted."""
        self._job_id: Any = None
        self._worked = 0
        """When this start's last step or validation ended; 0 before its first."""
        self._saved = 0
        """When a checkpoint was last complete."""
        self._first_compute: int | None = None
        """Of this start's first step, until it is known how long a step takes."""
        self._computes: list[int] = []
        self._handlers: dict[str, Callable[[int, Record], None]] = {
            "submitted": self._on_submitted,
            "launch": self._on_launch,
            "attempt": self._on_attempt,
            "ranks_started": self._on_ranks_started,
            "preflight": self._on_preflight,
            "begin": self._on_begin,
            "start": self._on_training,
            "resume": self._on_training,
            "checkpoint": self._on_checkpoint,
            "rollback": self._on_rollback,
            "end": self._on_end,
            "stop": self._on_stop,
            "finished": self._on_finished,
            "failure": self._on_failure,
            "requeue": self._on_requeue,
            "give_up": self._on_give_up,
            "done": self._on_done,
        }

    def on_event(self, at: int, event: Record) -> None:
        """A line of events.jsonl. Events that are not known here say nothing of time."""
        if (handler := self._handlers.get(str(event.get("event")))) is not None:
            handler(at, event)

    def on_lost(self, at: int, change: int) -> None:
        """A stretch of lost steps begins (`change` 1) or ends (-1) here."""
        if self._phase == "steps":
            self._until(at)
            if change > 0:
                self.history.train_again(at)
            else:
                self._worked = at
        self._losing += change

    def on_metrics(self, at: int, line: Record) -> None:
        """A line of metrics.jsonl: a step or a validation, which ended here."""
        account = self.account
        end = max(at, account.now)
        room = end - account.now
        validation = min(room, microseconds(line.get("validation_s")))
        whole = min(room - validation, microseconds(line.get("step_time_s")))
        data = min(whole, microseconds(line.get("data_s")))
        saving = min(room - validation - whole, microseconds(line.get("save_s")))
        account.take(room - validation - whole - saving, self._ground)
        account.take(saving, "saving")
        account.take(validation, "validation")
        account.take(data, "data")
        if "loss" in line:
            self._compute(int(line["step"]), whole - data)
            self.history.step(end, int(line["step"]))
        else:
            account.take(whole - data, self._ground)
        self._worked = end

    def close(self, now: int | None) -> None:
        """The end of the records; `now` where the run still goes on."""
        self._settle_first_step()
        if now is not None:
            self._wait_in_queue()
            self._until(now)
        else:
            self.history.end(self.account.now, _NO_WORD)

    @property
    def _ground(self) -> Category:
        """Where time goes of which nothing is said."""
        if self._phase != "steps":
            return self._phase
        return "lost" if self._losing else "other"

    def _until(self, at: int, category: Category | None = None) -> None:
        self.account.until(at, category or self._ground)

    def _begin_anew(self, at: int) -> None:
        """Here something begins, and nothing may have said how what was before it has ended."""
        if self._phase not in ("queued", "restarts"):
            self._phase = "stopped"
        self.history.end(self.account.now, _NO_WORD)
        self._until(at)

    def _compute(self, step: int, compute: int) -> None:
        """All of a step but the waiting for data."""
        if self._first_compute is None:
            self._first_compute = compute
            self.account.take(compute, "first_step")
            return
        waited = min(compute, self._cost_of_step(step))
        self.account.take(waited, "stragglers")
        self.account.take(compute - waited, "steps")
        if len(self._computes) < _TYPICAL_STEPS:
            self._computes.append(compute)

    def _settle_first_step(self) -> None:
        """Of a start's first step as much counts as its other steps took."""
        if self._first_compute is not None and self._computes:
            self.account.move(min(self._first_compute, round(median(self._computes))), "first_step", "steps")
        self._first_compute = None
        self._computes = []

    def _on_submitted(self, at: int, event: Record) -> None:
        """Where a run trains, somebody else waits for it to end: only what follows shows it."""
        self._submitted = at

    def _wait_in_queue(self) -> None:
        if self._submitted:
            self._begin_anew(self._submitted)
            self._phase = "queued"
            self._submitted = 0

    def _on_launch(self, at: int, event: Record) -> None:
        submitted = microseconds(event.get("submitted"))
        if submitted != self._launched:  # else the job has begun before, and has not waited since it was submitted
            self._submitted = self._submitted or submitted
        self._launched = submitted
        self._wait_in_queue()
        job_id = event.get("job_id")
        if job_id is not None and job_id == self._job_id:
            # A scheduler starts a job again, without a word of it here, when it has lost the job's first host.
            self._phase = "queued"
        self._begin_anew(at)
        self._job_id = job_id
        self._phase = "launching"

    def _on_attempt(self, at: int, event: Record) -> None:
        if self._phase in ("steps", "building"):
            self._phase = "restarts"
        self._until(at)
        self.history.end(self.account.now, _NO_WORD)
        self.history.begin(at, number=event.get("attempt"), num_ranks=event.get("num_ranks"), hosts=event.get("hosts"))
        self._phase = "launching"

    def _on_ranks_started(self, at: int, event: Record) -> None:
        if self._phase == "launching":
            self._until(at)
            self._phase = "building"

    def _on_preflight(self, at: int, event: Record) -> None:
        if self._phase in ("launching", "building"):
            self._until(at - microseconds(event.get("seconds")))
            self._until(at, "preflight")
            self._phase = "building"

    def _on_begin(self, at: int, event: Record) -> None:
        """The first rank has loaded everything, and tells since when it lives."""
        began = min(at, microseconds(event.get("began")) or at)
        if self._phase not in ("launching", "building"):  # nobody else has told of this start
            self._begin_anew(began)
            hosts = (event["host"],) if "host" in event else ()
            self.history.begin(began, num_ranks=event.get("num_ranks"), hosts=hosts)
        self._until(began)
        self._until(at, "building")
        self._phase = "building"

    def _on_training(self, at: int, event: Record) -> None:
        if self._phase not in ("launching", "building"):
            self._begin_anew(at)
            self.history.begin(at)
        self._until(at, "building")
        self._settle_first_step()
        self._worked = 0
        self.history.train()
        if self._losing:  # all steps of this start were lost later, and tell of themselves no more
            self.history.train_again(at)
        self._phase = "steps"

    def _on_checkpoint(self, at: int, event: Record) -> None:
        self._saved = at

    def _on_rollback(self, at: int, event: Record) -> None:
        self.history.lose(
            from_step=_whole(event.get("from_step")),
            num_steps=_whole(event.get("lost_steps")),
            seconds=microseconds(event.get("lost_seconds")) / 1e6,
        )

    def _on_end(self, at: int, event: Record) -> None:
        """The last thing that the loop does is to wait for its last save."""
        if self._phase == "steps":
            if self._first_compute is not None:
                self._until(min(self._saved, at), "saving")
            self._until(at)
            self._phase = "finishing"

    def _on_stop(self, at: int, event: Record) -> None:
        self._on_end(at, event)
        self._until(at)
        self._phase = "stopped"
        self.history.end(at, str(event.get("message") or "stopped"))

    def _on_finished(self, at: int, event: Record) -> None:
        """Of the first rank; a supervisor then waits for the others."""
        if self._phase == "finishing":
            self._until(at)
            self.history.end(at, "finished")

    def _on_failure(self, at: int, event: Record) -> None:
        if self._phase == "steps" and not self._losing:
            self._phase = "restarts"
        self._until(at)
        self._phase = "restarts"
        happened = microseconds(event.get("at")) or self._hung_since(event)
        self.history.fail(
            Failure(
                attempt=event.get("attempt"),
                kind=str(event.get("kind") or "failure"),
                rank=event.get("rank"),
                host=event.get("host"),
                message=str(event.get("message") or ""),
                time=at / 1e6,
                happened=happened / 1e6 if happened else None,
            )
        )

    def _hung_since(self, event: Record) -> int:
        """0 where that is not known, or it is no hang."""
        # Within a stretch of lost steps nothing tells where this start's own steps ended.
        return self._worked if event.get("kind") == "hang" and not self._losing else 0

    def _on_requeue(self, at: int, event: Record) -> None:
        if self._phase == "steps":
            self._phase = "restarts"
        self._until(at)
        self._phase = "queued"
        self.history.end(at, f"requeued: {event.get('reason', '')}".removesuffix(": "))

    def _on_give_up(self, at: int, event: Record) -> None:
        if self._phase == "steps":
            self._phase = "restarts"
        self._over(at, str(event.get("cause") or "given up"))

    def _on_done(self, at: int, event: Record) -> None:
        self._over(at, "finished")

    def _over(self, at: int, ending: str) -> None:
        self._until(at)
        self._phase = "stopped"
        self.history.end(at, ending)
        self.history.give_up()


def _whole(number: Any) -> int:
    return number if isinstance(number, int) else 0
