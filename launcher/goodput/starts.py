"""What a ledger tells beside its sums: each start of a run, and each failure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(kw_only=True)
class Start:
    """One start of the run's ranks. Times in seconds since 1970."""

    number: int
    """Of the attempt, as its folder in logs/ has it, under a supervisor; else 1 for the first start."""
    began: float
    trained: float | None = None
    """When its first step had been made."""
    ended: float | None = None
    """When it was over, as far as is known; None while it goes on."""
    first_step: int | None = None
    last_step: int | None = None
    """Steps that were lost later are counted."""
    num_ranks: int | None = None
    hosts: tuple[str, ...] = ()
    ending: str = ""
    """How it ended, in words; empty while it goes on."""

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(kw_only=True)
class Failure:
    """What ended an attempt under a supervisor. Durations in seconds, None where they are not known (yet)."""

    attempt: int | None
    kind: str
    rank: int | None
    host: str | None
    message: str
    time: float
    """When it was told, in seconds since 1970: once nothing of the attempt ran any more."""
    happened: float | None
    """When it happened, in seconds since 1970: when a rank, a host or their starter ended, or a host that fell silent was heard
    last; in a hang, when ranks began to wait, or else when the step or validation before it ended. None where that is not
    known."""
    train_again_s: float | None = None
    """From when it happened (was told, where that is not known) to the end of the first step after it."""
    lost_steps: int = 0
    lost_s: float = 0.0
    """Time that the lost steps had taken."""

    @property
    def detect_s(self) -> float | None:
        """From when it happened to when it was told. So it holds what the end of the attempt's other ranks took."""
        return None if self.happened is None else max(0.0, self.time - self.happened)

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "detect_s": self.detect_s}


class History:
    """Collects them. Times that are handed in are in microseconds since 1970."""

    def __init__(self) -> None:
        self.starts: list[Start] = []
        self.failures: list[Failure] = []
        self._trained: Start | None = None
        """The last start that came as far as to train."""
        self._open: list[Failure] = []
        """Failures after which no step has been made yet."""

    def begin(self, at: int, *, number: Any = None, num_ranks: Any = None, hosts: Any = ()) -> None:
        """A start, whose number is one more than the last one's where nobody has given it one."""
        last = self.starts[-1].number if self.starts else 0
        self.starts.append(
            Start(
                number=number if isinstance(number, int) else last + 1,
                began=at / 1e6,
                num_ranks=num_ranks if isinstance(num_ranks, int) else None,
                hosts=tuple(map(str, hosts)) if isinstance(hosts, list | tuple) else (),
            )
        )

    def train(self) -> None:
        """The start that is going on begins to train."""
        self._trained = self.starts[-1] if self.starts else None

    def step(self, at: int, step: int) -> None:
        """A step has been made."""
        if self.starts:
            start = self.starts[-1]
            if start.first_step is None:
                start.first_step, start.trained = step, at / 1e6
            start.last_step = step
        self.train_again(at)

    def train_again(self, at: int) -> None:
        """The failures before are over."""
        for failure in self._open:
            since = failure.time if failure.happened is None else failure.happened
            failure.train_again_s = max(0.0, at / 1e6 - since)
        self._open = []

    def fail(self, failure: Failure) -> None:
        """The start that is going on has failed."""
        self.failures.append(failure)
        self._open.append(failure)
        self.end(round(failure.time * 1e6), failure.message or failure.kind)

    def lose(self, *, from_step: int, num_steps: int, seconds: float) -> None:
        """Steps up to `from_step` are lost, by the first failure since."""
        if self._trained is not None:
            self._trained.last_step = max(self._trained.last_step or 0, from_step)
        if self._open:
            self._open[0].lost_steps += num_steps
            self._open[0].lost_s += seconds

    def end(self, at: int, ending: str) -> None:
        """The start that is going on is over; where it is already, what was said first stands."""
        if self.starts and self.starts[-1].ended is None:
            self.starts[-1].ended = at / 1e6
            self.starts[-1].ending = ending

    def give_up(self) -> None:
        """Nobody will train on after the failures so far."""
        self._open = []
