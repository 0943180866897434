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

    @classmethod
    def quick(cls) -> DiagnosisSettings:
        """For a look before a run starts: what costs it so much that the host is better left out, in few seconds.

        Shorter transfers are noisier, which the thresholds follow; a small loss that they hide is none of interest here.
        Work is a little longer than a period of quotas, as it must be.
        """
        return cls(least_bandwidth_loss=0.2, least_compute_loss=0.15, transfer_s=0.05, work_s=0.12, most_seconds=6.0)

    @property
    def least_log_loss(self) -> float:
        """`least_bandwidth_loss` as a difference of natural logarithms, above zero."""
        return -math.log1p(-self.least_bandwidth_loss)
