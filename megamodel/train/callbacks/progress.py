"""What a person sees while training runs: rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from megamodel.train.callbacks.base import Callback, RunFacts, StepRecord
from megamodel.train.validation import ValidationResult


class ProgressLine(Callback):
    """Step, loss, tokens/s, MFU with its denominator (or TFLOP/s where the device is unknown) and the time left."""

    def __init__(self, console: Console, *, every_steps: int) -> None:
        self._console = console
        self._every = every_steps
        self._facts: RunFacts | None = None
        self._rate = _SmoothedStepTime()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def on_start(self, facts: RunFacts) -> None:
        """Says what is trained, on what, and against what MFU is measured."""
        self._facts = facts
        self._say(
            f"{facts.num_parameters / 1e6:,.1f}M parameters ({facts.num_active_parameters / 1e6:,.1f}M active a token), "
            f"{facts.world_size} rank(s), {facts.device_name}"
        )
        if facts.peak_source is not None:
            self._say(f"MFU is measured against {facts.peak_source}")
        else:
            self._say("no published bf16 peak is known for this device and precision: TFLOP/s are shown, and no MFU")
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
                console=self._console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=facts.total_steps, completed=facts.first_step - 1)
            self._bar.start()

    def on_step(self, record: StepRecord) -> None:
        """A line each few steps; on a terminal the bar moves with each."""
        facts = self._facts
        assert facts is not None
        self._rate.add(record.step_time_s)
        speed = f"{record.tokens_per_s:,.0f} tok/s"
        speed += f" · {record.model_flops_per_s / 1e12:.2f} TFLOP/s"
        if record.mfu is not None:
            speed += f" · MFU {record.mfu:.1%}"
        text = f"loss {record.result.loss:.4f}"
        if record.step == facts.first_step:  # it compiles and warms up: its speed says nothing of the others'
            text += f" · first step in {record.step_time_s:.1f} s"
        else:
            text += f" · {speed} · ETA {_clock(self._rate.seconds * (facts.total_steps - record.step))}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=record.step, description=text)
        if record.step % self._every == 0 or record.step in (facts.first_step, facts.total_steps):
            self._say(f"step {record.step}/{facts.total_steps} · {text}")

    def on_validation(self, step: int, result: ValidationResult, seconds: float) -> None:
        """The held-out loss, in nats a token and in bits a byte."""
        self._say(
            f"step {step} · validation loss {result.loss:.4f} · {result.bits_per_byte:.4f} bits per byte "
            f"({result.num_tokens:,} tokens, {seconds:.1f} s)"
        )

    def on_event(self, event: str, **details: object) -> None:
        """In words, where the event brings some."""
        if "message" in details:
            self._say(str(details["message"]))

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class _SmoothedStepTime:
    """Seconds a step, smoothed; the first step is left out, since it compiles."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._count = 0

    def add(self, seconds: float) -> None:
        self._count += 1
        if self._count <= 2:
            self.seconds = seconds
        else:
            self.seconds += 0.1 * (seconds - self.seconds)


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S" if seconds >= 3600 else "%M:%S", time.gmtime(max(0.0, seconds)))
