"""What preflight found: findings, which hosts to leave out, and what was seen on the way. Imports without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.fabric.findings import Kind as FabricKind

OwnKind = Literal[
    "version", "source", "package", "environment", "device", "slow_device", "disk", "shared_files", "clock", "network"
]
"""version: Python, torch, NCCL and the like differ. source: this package's own files do. package: installed distributions do.
environment: variables that matter to training do. device: GPUs differ, are broken, or compute wrongly. slow_device: one of a
host's GPUs is slower than the others. disk: too little is free. shared_files: the run's folder is not the same everywhere.
clock: too far from the others. network: ports are missing, or slower than elsewhere."""
PreflightKind = OwnKind | FabricKind
Severity = Literal["error", "warning"]


@dataclass(frozen=True, kw_only=True)
class PreflightFinding:
    """One thing that is wrong."""

    kind: PreflightKind
    hosts: tuple[str, ...]
    """Whom it concerns, by name."""
    ranks: tuple[int, ...]
    sentence: str
    """What, where, and the mend."""
    bad_hosts: tuple[str, ...] = ()
    """Those of the hosts without which it would be gone. Empty where nobody can say who is wrong."""
    severity: Severity = "error"
    """A warning is told, and speaks against no start."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """Plain data for JSON."""

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kind": self.kind,
            "severity": self.severity,
            "hosts": list(self.hosts),
            "ranks": list(self.ranks),
            "bad_hosts": list(self.bad_hosts),
            "sentence": self.sentence,
            "evidence": dict(self.evidence),
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> PreflightFinding:
        """What `as_data` wrote."""
        return cls(**{**data, **{name: tuple(data[name]) for name in ("hosts", "ranks", "bad_hosts")}})


@dataclass(frozen=True, kw_only=True)
class PreflightVerdict:
    """All that was found before the first step."""

    findings: tuple[PreflightFinding, ...]
    seconds: float
    """From when the ranks had met."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Plain data: `hosts` with their ranks, `versions`, `devices`, `network`, `free_bytes`, `clock_offset_s`, `fabric` (the
    diagnosis, or why there was none) and `stage_seconds`."""

    @property
    def ok(self) -> bool:
        """Nothing speaks against training: warnings do not."""
        return all(finding.severity == "warning" for finding in self.findings)

    @property
    def bad_hosts(self) -> tuple[str, ...]:
        """Hosts to leave out, each once."""
        return tuple(dict.fromkeys(host for finding in self.findings for host in finding.bad_hosts))

    @property
    def errors(self) -> tuple[PreflightFinding, ...]:
        """Findings that speak against training."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> tuple[PreflightFinding, ...]:
        """The others."""
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    @property
    def reasons(self) -> dict[str, str]:
        """Why each bad host is one: the first sentence that blames it."""
        blamed = [(host, finding.sentence) for finding in self.findings for host in finding.bad_hosts]
        return dict(reversed(blamed))

    def as_data(self) -> dict[str, Any]:
        """For JSON. `sentences` and `reasons` say again what the findings hold, for those who only tell them."""
        return {
            "ok": self.ok,
            "findings": [finding.as_data() for finding in self.findings],
            "sentences": [finding.sentence for finding in (*self.errors, *self.warnings)],
            "bad_hosts": list(self.bad_hosts),
            "reasons": self.reasons,
            "seconds": self.seconds,
            "details": dict(self.details),
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> PreflightVerdict:
        """What `as_data` wrote."""
        return cls(
            findings=tuple(map(PreflightFinding.from_data, data["findings"])),
            seconds=data["seconds"],
            details=data["details"],
        )
