"""What a diagnosis looks for, and how much it may spend. Imports without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DiagnosisSettings:
    """Effects of interest and budgets. Thresholds are no settings: they follow from the noise that is measured."""

    least_bandwidth_loss: float = 0.10
    """Smallest share of a link's rate whose loss is a finding."""
    least_compute_loss: float = 0.05
    """Smallest share by which compute takes longer that is a finding."""
    transfer_s: float = 0.1
    """Seconds that a healthy transfer takes."""
    least_bytes: int = 256 * 1024
    """Of a transfer: smaller ones show a network's latency, not its rate."""
    most_bytes: int = 1 << 28
    """Of a transfer."""
    work_s: float = 0.2
    """Seconds of one piece of compute on a healthy endpoint; shorter where more than eight share a machine. Longer than a
    period of the scheduler's quotas (0.1 s by default), which slow down nothing that is shorter."""
    false_alarm_rate: float = 1e-3
    """Of one diagnosis of a fabric without a fault, as far as the statistics go."""
    most_seconds: float = 18.0
    """Repeats that would make a finding surer are left out after this long."""
    seed: int = 0
    """Of the order in which pairs are measured."""

    @property
    def least_log_loss(self) -> float:
        """`least_bandwidth_loss` as a difference of natural logarithms, above zero."""
        return -math.log1p(-self.least_bandwidth_loss)
