"""What a diagnosis says: findings, each with its culprit, evidence, confidence and one sentence. Imports without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Kind = Literal[
    "slow_host",
    "slow_sender",
    "slow_receiver",
    "slow_link",
    "bad_path",
    "congested_uplink",
    "missing_rank",
    "mismatched_collective",
    "transport_fault",
]
"""slow_host: its compute is slow. slow_sender, slow_receiver: its link is slow outwards, inwards; slow_link: both ways.
bad_path: from one host to one other alone. congested_uplink: between groups of hosts, under load. missing_rank: it never
came, or answers no more. mismatched_collective: ranks called different collectives. transport_fault: all came to a
collective, and it does not complete."""

KINDS: tuple[Kind, ...] = get_args(Kind)
EXCLUDABLE: frozenset[Kind] = frozenset(
    {"slow_host", "slow_sender", "slow_receiver", "slow_link", "missing_rank", "transport_fault"}
)
"""Kinds that a scheduler mends by leaving the named hosts out. A path or an uplink has more than one end."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong."""

    kind: Kind
    hosts: tuple[str, ...]
    """The culprits by name. bad_path: sender and receiver. congested_uplink: all hosts whose traffic crosses it."""
    ranks: tuple[int, ...]
    confidence: float
    """Probability, 0 to 1, that this finding is right, given the measured noise."""
    evidence: Mapping[str, Any]
    """What it rests on: plain data for JSON, with units in the keys (`_s`, `_bytes_per_s`, `_share`)."""
    sentence: str

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kind": self.kind,
            "hosts": list(self.hosts),
            "ranks": list(self.ranks),
            "confidence": self.confidence,
            "evidence": dict(self.evidence),
            "sentence": self.sentence,
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Finding:
        """What `as_data` wrote."""
        return cls(
            kind=data["kind"],
            hosts=tuple(data["hosts"]),
            ranks=tuple(data["ranks"]),
            confidence=data["confidence"],
            evidence=data["evidence"],
            sentence=data["sentence"],
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All that a diagnosis found, and what it measured on the way."""

    findings: tuple[Finding, ...]
    """The most certain first; none where all is well."""
    alpha_s: float | None
    """Start-up time of a message between two hosts, in seconds: the median over pairs. None where nothing was measured."""
    beta_s_per_byte: float | None
    """Seconds a byte between two hosts: the median over pairs."""
    seconds: float
    """How long the diagnosis took."""
    rounds: int
    """Sets of transfers that were run at once, one set after another, measurements of compute included."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Plain data for the report: `hosts` (names), `pairs_bytes_per_s` (matrix, row sends to column, null where not
    measured), `compute_s` (by host), `noise_share`, `groups` (hosts that share a switch, where it shows)."""

    @property
    def healthy(self) -> bool:
        """Nothing was found."""
        return not self.findings

    def as_data(self) -> dict[str, Any]:
        """For JSON: the keys that `mega fabric diagnose --json` promises, `rounds` and `details`."""
        return {
            "healthy": self.healthy,
            "findings": [finding.as_data() for finding in self.findings],
            "alpha_s": self.alpha_s,
            "beta_s_per_byte": self.beta_s_per_byte,
            "seconds": self.seconds,
            "rounds": self.rounds,
            "details": dict(self.details),
        }


def hosts_to_exclude(findings: Sequence[Finding]) -> tuple[str, ...]:
    """Hosts without which the findings would be gone, each once, in the order of findings. Of a bad path, its receiver."""
    names: dict[str, None] = {}
    for finding in findings:
        if finding.kind in EXCLUDABLE:
            names |= dict.fromkeys(finding.hosts)
        elif finding.kind == "bad_path" and not set(finding.hosts) & names.keys():
            names[finding.hosts[-1]] = None
    return tuple(names)
