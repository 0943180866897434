"""From confirmed slow parts to findings: both ways of one thing become one, and what one fault explains is not another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.fabric.analysis.explain import Part
from cluster.fabric.analysis.sentences import sentence
from cluster.fabric.counters import cite, mean
from cluster.fabric.findings import Finding, Kind
from cluster.fabric.probing import Endpoint

_ONE_WAY = 0.4
"""Physics: a loss one way that is less than this share of the other way's is a side effect of it. A queue or loss one way delays
the acknowledgements of what comes the other way, which costs that a part of its rate, as measured on hosts with one such fault;
a host that is slow both ways by itself loses about as much each way."""
_LEAST_RULE = 0.1
"""Effect of interest: a way that loses less than this as a rule (by the median) is slow by accidents alone."""
_MOST_CERTAIN = 0.999
"""Statistics: no model of noise is right to more digits than this, however small the tail that it computes."""


@dataclass(frozen=True, kw_only=True)
class Slow:
    """Something that fresh measurements found slow: a part of the network, or an endpoint's compute where `part` is None."""

    part: Part | None
    endpoint: int | None = None
    log_loss: float
    """Logarithm of how many times slower it is than its controls."""
    tail: float
    """Probability of the measurement if it were well."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """Plain data, for the finding."""


@dataclass(frozen=True, kw_only=True)
class _Draft:
    kind: Kind
    endpoints: tuple[int, ...]
    log_loss: float
    tail: float
    evidence: Mapping[str, Any]


def judged(
    slow: Sequence[Slow],
    endpoints: Sequence[Endpoint],
    *,
    growth: Sequence[Mapping[str, float]],
) -> tuple[Finding, ...]:
    """Findings, the greatest effect among the most certain first.

    Args:
        slow: what was confirmed.
        endpoints: of the fabric.
        growth: of each endpoint's counters over the measurement.
    """
    drafts = [*_computing(slow), *_hosts(slow), *_paths(slow), *_uplinks(slow, len(endpoints))]
    return tuple(_finding(draft, endpoints, growth) for draft in _without_explained(drafts))


def _computing(slow: Sequence[Slow]) -> list[_Draft]:
    return [
        _Draft(
            kind="slow_host", endpoints=(item.endpoint,), log_loss=item.log_loss, tail=item.tail, evidence=item.evidence
        )
        for item in slow
        if item.part is None and item.endpoint is not None
    ]


def _hosts(slow: Sequence[Slow]) -> list[_Draft]:
    """Senders, receivers, and hosts that are both."""
    ways: dict[int, dict[str, Slow]] = {}
    for item in slow:
        if item.part is not None and item.part.kind in ("sender", "receiver"):
            ways.setdefault(item.part.host, {})[item.part.kind] = item
    drafts = []
    for host, found in ways.items():
        strongest = max(found.values(), key=lambda item: item.log_loss)
        kept = {
            way: item
            for way, item in found.items()
            if item is strongest or (item.log_loss >= _ONE_WAY * strongest.log_loss and _is_slow_mostly(item))
        }
        kind: Kind = "slow_link" if len(kept) == 2 else "slow_sender" if "sender" in kept else "slow_receiver"
        evidence: dict[str, Any] = {}
        for way in ("sender", "receiver"):
            if way in found:
                prefix = "outwards" if way == "sender" else "inwards"
                evidence |= {f"{prefix}_{key}": value for key, value in found[way].evidence.items()}
        evidence["congested"] = any(item.evidence.get("standing_queue", False) for item in kept.values())
        tail = max(item.tail for item in kept.values())
        drafts.append(_Draft(kind=kind, endpoints=(host,), log_loss=strongest.log_loss, tail=tail, evidence=evidence))
    return drafts


def _is_slow_mostly(item: Slow) -> bool:
    """Whether it is slow as a rule. Packets that are lost one way delay now and then what comes the other way."""
    rate, control = item.evidence.get("bytes_per_s"), item.evidence.get("control_bytes_per_s")
    return rate is None or control is None or rate <= (1.0 - _LEAST_RULE) * control


def _paths(slow: Sequence[Slow]) -> list[_Draft]:
    """Paths; one that is slow both ways is one finding, in the direction that lost more."""
    found = {
        (next(iter(item.part.senders)), next(iter(item.part.receivers))): item
        for item in slow
        if item.part is not None and item.part.kind == "path"
    }
    drafts = []
    for (source, sink), item in sorted(found.items(), key=lambda entry: -entry[1].log_loss):
        back = found.get((sink, source))
        if back is not None and (back.log_loss, source) > (item.log_loss, sink):
            continue
        evidence = {**item.evidence, "both_ways": back is not None}
        drafts.append(
            _Draft(kind="bad_path", endpoints=(source, sink), log_loss=item.log_loss, tail=item.tail, evidence=evidence)
        )
    return drafts


def _uplinks(slow: Sequence[Slow], count: int) -> list[_Draft]:
    """Uplinks; both ways are one finding. Of two groups the smaller is behind the uplink; where they are equal, both are."""
    found = {item.part: item for item in slow if item.part is not None and item.part.kind == "uplink"}
    drafts: dict[frozenset[frozenset[int]], _Draft] = {}
    for part, item in sorted(found.items(), key=lambda entry: -entry[1].log_loss):
        groups = frozenset([part.senders, part.receivers])
        if groups in drafts:
            continue
        back = next((other for other in found if other.senders == part.receivers and other != part), None)
        smaller = min(part.senders, part.receivers, key=len)
        behind = smaller if 2 * len(smaller) < count else part.senders | part.receivers
        evidence = {
            **item.evidence,
            "from_endpoints": sorted(part.senders),
            "to_endpoints": sorted(part.receivers),
            "both_ways": back is not None,
        }
        if back is not None and "competing_flows" in evidence:
            more = found[back].evidence.get("competing_flows", [])
            evidence["competing_flows"] = [*evidence["competing_flows"], *more]
        drafts[groups] = _Draft(
            kind="congested_uplink",
            endpoints=tuple(sorted(behind)),
            log_loss=item.log_loss,
            tail=item.tail,
            evidence=evidence,
        )
    return list(drafts.values())


def _without_explained(drafts: Sequence[_Draft]) -> list[_Draft]:
    """A host whose compute is slow feeds its link slowly as well; a link much slower than that is a fault of its own."""
    computing = {draft.endpoints[0]: draft for draft in drafts if draft.kind == "slow_host"}
    kept = []
    for draft in drafts:
        cause = computing.get(draft.endpoints[0]) if draft.kind.startswith("slow_") else None
        if cause is None or cause is draft or draft.log_loss > 1.5 * cause.log_loss + 0.1:
            kept.append(draft)
    # Of equally certain ones first what slows more pairs, then what slows them more.
    return sorted(kept, key=lambda draft: (draft.tail > 1e-6, draft.kind == "bad_path", -draft.log_loss))


def _finding(draft: _Draft, endpoints: Sequence[Endpoint], growth: Sequence[Mapping[str, float]]) -> Finding:
    named = set(draft.endpoints)
    others = [grown for index, grown in enumerate(growth) if index not in named]
    citation = cite(draft.kind, mean([growth[index] for index in draft.endpoints]), others=others)
    evidence = {
        **_with_names(draft.evidence, endpoints),
        "lost_share": float(-np.expm1(-draft.log_loss)),
        "false_alarm_probability": draft.tail,
        "counters": {"supports": list(citation.supports), "contradicts": list(citation.contradicts)},
    }
    hosts = tuple(dict.fromkeys(endpoints[index].host for index in draft.endpoints))
    confidence = min(1.0 - draft.tail, _MOST_CERTAIN)
    return Finding(
        kind=draft.kind,
        hosts=hosts,
        ranks=tuple(endpoints[index].rank for index in draft.endpoints),
        confidence=confidence,
        evidence=evidence,
        sentence=sentence(draft.kind, hosts, evidence, confidence),
    )


def _with_names(evidence: Mapping[str, Any], endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """Endpoints by index become hosts by name."""
    return {
        key.replace("_endpoints", "_hosts"): [endpoints[index].host for index in value]
        if key.endswith("_endpoints")
        else value
        for key, value in evidence.items()
    }
