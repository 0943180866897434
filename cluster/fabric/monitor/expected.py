"""What a step's communication should take by the formulas of the run and a sweep of the cluster, beside what it takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.errors import FabricError
from cluster.fabric.monitor.windows import ENDS_TOGETHER, Window
from cluster.fabric.predict import CommunicationRow, MeasuredTime, compare, predict
from cluster.fabric.sweep import SweepResult


def read_profile(path: Path) -> SweepResult:
    """What `mega fabric sweep --output` wrote. Raises FabricError where it is not there, or is something else."""
    try:
        return SweepResult.from_data(json.loads(path.read_text()))
    except OSError as error:
        raise FabricError(f"fabric.profile = {str(path)!r}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FabricError(
            f"fabric.profile = {str(path)!r}: is not the result of a sweep; make one with mega fabric sweep --output"
        ) from error


@dataclass(frozen=True, kw_only=True)
class ExpectedStep:
    """What rank 0 communicates in each step, and the sweep that says how long that takes."""

    profile: SweepResult
    rows: tuple[CommunicationRow, ...]

    def as_payload(self) -> dict[str, Any]:
        """For the side channel: of the profile what predicting needs, since a message has a size."""
        groups = tuple(replace(each, groups=each.groups[:1]) for each in self.profile.groups)
        fits = replace(self.profile, rows=(), groups=groups, circumstances={})
        return {"profile": fits.as_data(), "rows": [asdict(row) for row in self.rows]}

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> ExpectedStep:
        """What `as_payload` made."""
        return cls(
            profile=SweepResult.from_data(payload["profile"]),
            rows=tuple(CommunicationRow(**row) for row in payload["rows"]),
        )

    def beside(self, window: Window) -> dict[str, Any]:
        """Details of the event "communication_time": for each axis and kind expected and measured seconds a step.

        Measured is what the collectives take when nobody is late. Messages and broadcasts are left out: how long they take
        cannot be told from how long the other side lets one wait.
        """
        prediction = predict(self.profile, [row for row in self.rows if row.kind in ENDS_TOGETHER])
        measured = [
            MeasuredTime(axis=axis, kind=kind, seconds=seconds) for (axis, kind), seconds in window.kinds_s.items()
        ]
        differences = compare(prediction, measured)
        notable: Sequence[str] = [each.sentence for each in differences if each.notable]
        return {
            "step": window.last_step,
            "expected_s": prediction.seconds,
            "measured_s": sum(window.kinds_s.values()),
            "rows": [each.as_data() for each in differences],
            "message": f"communication of a step: {'; '.join(notable) or 'as long as the sweep lets expect'}",
        }
