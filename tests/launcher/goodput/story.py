"""A made-up run that writes the records of a real one, and keeps count of what its time was spent on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launcher.goodput import Ledger, read_ledger
from launcher.goodput.account import Category
from megamodel.train.json_lines import append_line
from megamodel.train.run_directory import RunDirectory

STEP_S = 2.0
COMPILE_S = 20.0
SAVE_EVERY = 5


@dataclass(kw_only=True)
class Story:
    """Methods let time pass, in the order in which they are called. All steps compute for STEP_S."""

    root: Path
    clock: float = 1_700_000_000.0
    spent: Counter[Category] = field(default_factory=Counter)
    step: int = 0
    saved: int = 0
    attempt: int = 0
    held_up_s: float = 0.0
    """By the last save, which the next step tells."""

    def __post_init__(self) -> None:
        self.run = RunDirectory(self.root)
        self.began = self.clock

    def event(self, name: str, **details: Any) -> None:
        """A line of events.jsonl."""
        append_line(self.run.events, {"time": self.clock, "event": name, **details})

    def passes(self, seconds: float, category: Category) -> None:
        """Time that is spent on something."""
        self.clock += seconds
        self.spent[category] += seconds

    def launched(self, *, queued_s: float = 0.0, job_id: str | None = "17") -> None:
        """A job is submitted, waits, and its supervisor begins."""
        submitted = self.clock
        self.passes(queued_s, "queued")
        self.event("launch", backend="slurm", job_id=job_id, nodes=2, host="n1", submitted=submitted)

    def attempts(self, *, launching_s: float = 1.0, preflight_s: float | None = 3.0) -> None:
        """The supervisor starts ranks, which look about."""
        self.attempt += 1
        self.event("attempt", attempt=self.attempt, hosts=["n1", "n2"], num_ranks=2, restart=self.attempt > 1)
        self.passes(launching_s, "launching")
        self.event("ranks_started", attempt=self.attempt, seconds=launching_s)
        if preflight_s is not None:
            self.passes(preflight_s, "preflight")
            self.event("preflight", attempt=self.attempt, ok=True, seconds=preflight_s)

    def loads(self, *, seconds: float = 7.0) -> None:
        """Imports, data, model, checkpoint; up to the first step."""
        began = self.clock
        self.passes(seconds, "building")
        self.event("begin", began=began, host="n1", num_ranks=2)
        lost = self.run.forget_metrics_after(self.saved)
        if lost is not None:
            self.event("rollback", **vars(lost))
        self.event("resume" if self.saved else "start", step=self.saved)
        self.step = self.saved

    def trains(self, steps: int, *, first: bool = True, saves: bool = True, data_s: float = 0.1) -> None:
        """Makes steps; saves every SAVE_EVERY of them, if it `saves`. The `first` one compiles."""
        for number in range(steps):
            began = self.clock
            self.clock += self.held_up_s + data_s + STEP_S + (COMPILE_S if first and number == 0 else 0.0)
            self.step += 1
            self.line(loss=1.0, step_time_s=self.clock - began - self.held_up_s, data_s=data_s, save_s=self.held_up_s)
            self.spent.update({"saving": self.held_up_s, "data": data_s, "steps": STEP_S})
            self.spent["first_step"] += COMPILE_S if first and number == 0 else 0.0
            self.held_up_s = 0.0
            self.passes(0.01, "other")  # the writing of records
            if saves and self.step % SAVE_EVERY == 0:
                self.validates()
                self.saves()

    def validates(self, *, seconds: float = 1.5) -> None:
        """Validates after the last step."""
        self.passes(seconds, "validation")
        self.line(val_loss=1.0, validation_s=seconds)

    def saves(self, *, blocks_s: float = 0.5) -> None:
        """Saves the last step; the time is told by the step after it."""
        self.held_up_s = blocks_s
        self.saved = self.step
        self.event("checkpoint", step=self.step)

    def line(self, **figures: Any) -> None:
        """A line of metrics.jsonl."""
        append_line(self.run.metrics, {"time": self.clock, "step": self.step, **figures})

    def loses(self, steps: int, *, data_s: float = 0.1) -> None:
        """Makes steps that no save follows."""
        before = self.spent.copy()
        began = self.clock
        self.trains(steps, first=False, saves=False, data_s=data_s)
        self.clock -= 0.01  # the last one's end is the last that is known of them
        self.spent = before
        self.spent["lost"] += self.clock - began

    def fails(self, *, after_s: float = 1.0, **details: Any) -> None:
        """The supervisor sees a failure."""
        self.passes(after_s, "restarts")
        self.held_up_s = 0.0
        self.event("failure", attempt=self.attempt, **{"kind": "signal", "message": "rank 1 on n2 died", **details})

    def ends(self, *, waits_s: float = 0.4, finishing_s: float = 6.0) -> None:
        """The last step is saved, export and samples are made."""
        self.passes(waits_s, "saving")
        self.held_up_s = 0.0
        self.saved = self.step
        self.event("checkpoint", step=self.step)
        self.event("end", step=self.step)
        self.passes(finishing_s, "finishing")
        self.event("finished", step=self.step)

    def stops(self, *, saving_s: float = 0.4) -> None:
        """A signal has come; saved."""
        self.passes(saving_s, "saving")
        self.held_up_s = 0.0
        self.saved = self.step
        self.event("checkpoint", step=self.step)
        self.event("stop", step=self.step, signal="SIGTERM", message=f"stopped by SIGTERM after step {self.step}")

    def ledger(self, *, running: bool = False, submitted: float | None = None) -> Ledger:
        """As it is read from the records."""
        ledger = read_ledger(self.run, now=self.clock if running else None, submitted=submitted)
        assert ledger is not None
        return ledger

    def check(self, *, running: bool = False, submitted: float | None = None) -> Ledger:
        """The ledger knows what the time was spent on."""
        ledger = self.ledger(running=running, submitted=submitted)
        assert sum(ledger.spent.values()) == ledger.end - ledger.begin
        assert ledger.begin / 1e6 == pytest.approx(self.began, abs=1e-3)
        assert ledger.end / 1e6 == pytest.approx(self.clock, abs=2e-2)
        told = {category: seconds / 1e6 for category, seconds in ledger.spent.items() if seconds > 1000}
        assert told == pytest.approx(
            {what: s for what, s in self.spent.items() if s > 1e-3}, abs=0.1
        )  # records take a moment
        return ledger
