"""Where a rank left its own habit. A training loop repeats itself; a skipped or a different call breaks the repetition.

Needed where two ranks wait for one another, each in another collective: the counts of calls alone cannot tell which of
them is out of step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.fabric.watch.state import Break

_CONTEXT = 3
"""Calls before that must be the same. Fewer would take any rare call for a break, more need longer to learn."""
_TIMES = 2
"""How often that must have been seen."""
_LOOK_BACK = 24
"""A break further back than this many calls has nothing to do with where the rank stands now."""


@dataclass(frozen=True, kw_only=True)
class HabitualCall:
    """One collective in the order of all calls of a rank."""

    group: str
    axis: str
    number: int
    text: str
    digest: str

    @property
    def _token(self) -> tuple[str, str]:
        return self.group, self.digest


def find_breaks(calls: Sequence[HabitualCall]) -> tuple[Break, ...]:
    """The last calls that came where always another one has come before, the latest first."""
    tokens = [call._token for call in calls]
    followers: dict[tuple[tuple[str, str], ...], list[int]] = defaultdict(list)
    breaks: list[Break] = []
    for at in range(_CONTEXT, len(calls)):
        known = followers[tuple(tokens[at - _CONTEXT : at])]
        recent = at >= len(calls) - _LOOK_BACK
        if recent and len(known) >= _TIMES and all(tokens[place] != tokens[at] for place in known):
            breaks.append(_break(calls, due=known[-1], at=at))
        known.append(at)
    return tuple(reversed(breaks))


def _break(calls: Sequence[HabitualCall], *, due: int, at: int) -> Break:
    missed, came = calls[due], calls[at]
    before = [call.number for call in calls[:at] if call.group == missed.group]
    return Break(
        group=missed.group,
        number=before[-1] + 1,
        due=missed.text,
        due_digest=missed.digest,
        came=came.text if came.group == missed.group else f"{came.text} on {came.axis}",
        is_skip=calls[due + 1]._token == came._token,
        calls_ago=len(calls) - 1 - at,
    )
