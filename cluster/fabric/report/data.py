"""What a report is made of: plain data, as the verbs write it with `--json`. Each part is optional. Imports neither torch
nor what draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Plain = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything that one page shows. A part that is None or empty is left out of it."""

    title: str = "Fabric report"
    subtitle: str = ""
    """One line below the title, such as the cluster's name and when it was measured."""
    verdict: Plain | None = None
    """`Verdict.as_data()`."""
    sweep: Plain | None = None
    """`SweepResult.as_data()`."""
    waits: Sequence[Plain] = ()
    """The monitor's records, one a window of steps: `cluster.fabric.monitor.head_analyser` tells what is in a line."""
    predictions: Sequence[Plain] = ()
    """Expected and measured seconds, a row a kind of collective on an axis: `predict.Difference.as_data()`."""
    baseline: Plain | None = None
    """`BaselineCheck.as_data()`."""
    counters: Mapping[str, Mapping[str, float]] | None = None
    """By how much each counter grew while it was measured, by host; where None, `counters` of the verdict's details."""
