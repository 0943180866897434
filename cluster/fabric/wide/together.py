"""Many ends that are slow together where leaves are not known: rather something that they share than each of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.fabric.analysis.explain import Part, uplink
from cluster.fabric.analysis.judgement import Slow
from cluster.fabric.probing import Flows
from cluster.fabric.stages.session import Session
from cluster.fabric.wide.survey import Survey

MOST_AT_ONCE = 4
"""Effect of interest: as many hosts may be at fault at once, each by itself. Independent faults of more hosts than that are far
rarer than one fault of what many hosts share."""
_REPEATS = 2
"""Budget: rounds of each flow between accused ends."""
_FAST = 0.4
"""Physics: an end at fault is as slow to everyone. A flow that loses less than this share of what its ends lost elsewhere
passed whatever is at fault by; the rest is room for noise."""
_BOTH_WAYS = 0.5
"""Effect of interest: share of the ends accused one way from which on the other way counts as slow too."""


def without_scapegoats(survey: Survey, slow: Sequence[Slow]) -> list[Slow]:
    """The same where leaves are known. Where they are not, ends that rather share what is slow become one uplink's.

    Hosts behind one congested uplink are slow to nearly all others, like hosts whose own links are slow. More than a few at
    once are taken for that; of a few, those that are fast among one another are, which takes two rounds for each but one.
    """
    ends = [item for item in slow if item.part is not None and item.part.kind in ("sender", "receiver")]
    endpoints = {_host(item) for item in ends}
    hosts = {int(survey.layout.host_of[endpoint]) for endpoint in endpoints}
    if survey.layout.num_leaves > 1 or len(hosts) < 2:
        return list(slow)
    shared = endpoints if len(hosts) > MOST_AT_ONCE else _fast_among_themselves(survey, ends)
    accused = [item for item in ends if _host(item) in shared]
    return [*(item for item in slow if item not in accused), *_shared(survey.session, accused)]


def _fast_among_themselves(survey: Survey, ends: Sequence[Slow]) -> set[int]:
    """Accused endpoints whose slow way is fast to, or from, an accused one of another host, in every repeat."""
    session, host_of = survey.session, survey.layout.host_of
    session.during = "transfers among suspects"
    losses = {(_kind(item), _host(item)): item.log_loss for item in ends}
    endpoints = np.array(sorted({endpoint for _, endpoint in losses}), dtype=np.intp)
    acquitted: set[int] = set()
    for shift in range(1, len(endpoints)):
        flows: Flows = np.stack([endpoints, np.roll(endpoints, -shift)], axis=1)
        flows = flows[host_of[flows[:, 0]] != host_of[flows[:, 1]]]
        if not len(flows):
            continue
        rates = np.min([session.transfer(flows) for _ in range(_REPEATS)], axis=0)
        for (source, sink), loss in zip(flows.tolist(), survey.level - np.log(np.maximum(rates, 1.0)), strict=True):
            ways = (("sender", source), ("receiver", sink))
            acquitted |= {end for way, end in ways if (way, end) in losses and loss < _FAST * losses[way, end]}
    return acquitted


def _shared(session: Session, accused: Sequence[Slow]) -> list[Slow]:
    """One uplink's ways: from or to all the accused, whichever way more of them are slow, and the other if many are."""
    inside = frozenset(map(_host, accused))
    outside = frozenset(range(session.count)) - inside
    ways = [[item for item in accused if _kind(item) == kind] for kind in ("sender", "receiver")]
    parts = [uplink(inside, outside), uplink(outside, inside)]
    most = max(map(len, ways))
    return [_as_one(part, way) for part, way in zip(parts, ways, strict=True) if way and len(way) >= _BOTH_WAYS * most]


def _as_one(part: Part, way: Sequence[Slow]) -> Slow:
    """The typical one of them, less certain than the most certain."""
    figures = {
        key: float(np.median([item.evidence[key] for item in way])) for key in ("bytes_per_s", "control_bytes_per_s")
    }
    return Slow(
        part=part,
        log_loss=float(np.median([item.log_loss for item in way])),
        tail=float(np.median([item.tail for item in way])),
        evidence={**figures, "comparisons": sum(item.evidence["comparisons"] for item in way), "leaves_known": False},
    )


def _host(item: Slow) -> int:
    assert item.part is not None
    return item.part.host


def _kind(item: Slow) -> str:
    assert item.part is not None
    return item.part.kind
