"""What is wrong with a fabric, from measurements alone. Imports without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cluster.fabric.analysis.explain import Part
from cluster.fabric.analysis.judgement import Slow, judged
from cluster.fabric.analysis.sentences import names_in_words
from cluster.fabric.findings import Finding, Kind, Verdict
from cluster.fabric.probing import Fabric, StalledError, UnresponsiveError
from cluster.fabric.settings import DiagnosisSettings
from cluster.fabric.stages.competitors import competitors
from cluster.fabric.stages.computing import SlowCompute, slow_computing
from cluster.fabric.stages.confirm import Confirmation, Confirmed
from cluster.fabric.stages.queues import standing_queue
from cluster.fabric.stages.screen import screen
from cluster.fabric.stages.session import Session
from cluster.fabric.wide.computing import LEAST_PASSES
from cluster.fabric.wide.computing import slow_computing as slow_computing_of_many
from cluster.fabric.wide.layout import has_many_leaves
from cluster.fabric.wide.network import slow_network as slow_network_of_many
from cluster.fabric.wide.start_up import time_start_up

MOST_IN_FULL = 64
"""Budget: endpoints of which all pairs are measured; with more, pairs are drawn adaptively."""
_BROKEN_CONFIDENCE = 0.99
"""Of a rank that does not answer, or a transfer that does not complete, in time. No statistics: silence was seen, not inferred;
what is left of doubt is a host that would have answered later still."""


def diagnose(fabric: Fabric, settings: DiagnosisSettings | None = None) -> Verdict:
    """Screens the fabric, confirms each suspicion by fresh measurements, and says what is wrong.

    A rank that does not answer and a transfer that does not complete are findings, not errors, and end the diagnosis: what was
    confirmed before is in the verdict too.
    """
    session = Session(fabric, settings or DiagnosisSettings())
    slow: list[Slow] = []
    broken: list[Finding] = []
    try:
        for stage, rounds_after in ((_network, LEAST_PASSES), (_computing, 0)):
            slow += stage(session)
            if _is_wide(session):
                time_start_up(session, left=rounds_after)
    except UnresponsiveError as error:
        broken.append(_missing(session, error))
    except StalledError as error:
        broken.append(_stalled(session, error))
    findings = [*broken, *judged(slow, session.endpoints, growth=session.growth)]
    return Verdict(
        findings=tuple(findings),
        alpha_s=session.alpha_s,
        beta_s_per_byte=_beta(session),
        seconds=fabric.seconds,
        rounds=session.rounds,
        details=_details(session),
    )


def _is_wide(session: Session) -> bool:
    """Whether pairs are drawn adaptively: there are too many for all, or leaf by leaf, since flows between leaves may share
    a cable by chance, which is no fault."""
    return session.count > MOST_IN_FULL or has_many_leaves(session.endpoints)


def _computing(session: Session) -> list[Slow]:
    if _is_wide(session):
        return slow_computing_of_many(session)
    return [_slow_compute(item) for item in slow_computing(session)]


def _network(session: Session) -> list[Slow]:
    if session.count < 2:
        return []
    if _is_wide(session):
        return slow_network_of_many(session)
    suspected = screen(session).suspicions
    confirmed: list[Confirmed] = []
    tried: list[Part] = []
    # A suspicion may prove wrong in a way that names a better one: a path whose sender is slow to others as well.
    while suspected:
        confirmation = Confirmation(session, suspected, tried=tried)
        confirmed += [item for item in confirmation.run() if item.part not in {known.part for known in confirmed}]
        tried += [suspicion.part for suspicion in suspected]
        suspected = tuple(item for item in confirmation.spoilt_paths() if item.part not in tried)
    return [_slow_part(session, item, confirmed) for item in confirmed]


def _slow_part(session: Session, item: Confirmed, confirmed: Sequence[Confirmed]) -> Slow:
    evidence: dict[str, Any] = {
        "bytes_per_s": item.bytes_per_s,
        "control_bytes_per_s": item.control_bytes_per_s,
        "comparisons": item.loss.count,
    }
    if item.part.kind != "path":
        queue = standing_queue(session, item.part, [other.part for other in confirmed if other is not item])
        if queue is not None:
            evidence["standing_queue"] = queue.standing
            evidence["idle_round_trip_s"] = queue.round_trip_s
            evidence["control_round_trip_s"] = queue.control_round_trip_s
    if item.part.kind == "uplink":
        evidence |= competitors(session, item, standing=bool(evidence.get("standing_queue", False)))
    return Slow(part=item.part, log_loss=item.loss.mean, tail=item.tail, evidence=evidence)


def _slow_compute(item: SlowCompute) -> Slow:
    evidence = {"compute_s": item.seconds, "control_compute_s": item.control_s, "comparisons": item.loss.count}
    return Slow(part=None, endpoint=item.endpoint, log_loss=item.loss.mean, tail=item.tail, evidence=evidence)


def _missing(session: Session, error: UnresponsiveError) -> Finding:
    hosts = _hosts_of(session, error.ranks)
    several = len(error.ranks) > 1
    ranks = f"Rank{'s' * several} {names_in_words([str(rank) for rank in error.ranks])}"
    named = f" ({names_in_words(hosts)})" if hosts else ""
    verb = "answer" if several else "answers"
    return _broken(
        "missing_rank",
        hosts,
        error.ranks,
        f"{ranks}{named} {verb} no more, found during {error.during}: gone, stopped, or cut off.",
        during=error.during,
    )


def _stalled(session: Session, error: StalledError) -> Finding:
    ends = [rank for flow in error.flows for rank in flow]
    # An end that all stalled flows share is the culprit; without one, all ends are named. Where nobody knows of flows,
    # those that waited in vain are all there is to name.
    shared = [rank for rank in dict.fromkeys(ends) if all(rank in flow for flow in error.flows)]
    ranks = tuple(shared) if len(error.flows) > 1 and shared else tuple(dict.fromkeys(ends or error.ranks))
    hosts = _hosts_of(session, ranks)
    if error.flows:
        flows = ", ".join(f"{a} to {b}" for a, b in error.flows)
        said = f"Transfers at {names_in_words(hosts)} do not complete: all ranks answer, but nothing arrives from rank {flows}."
    else:
        numbers = names_in_words([str(rank) for rank in ranks])
        who = f"rank{'s' * (len(ranks) > 1)} {numbers}" + (f" ({names_in_words(hosts)})" if hosts else "")
        said = f"Nothing comes through during {error.during}: all ranks answer, but {who} waited in vain."
    flow_lists = [list(flow) for flow in error.flows]
    return _broken("transport_fault", hosts, ranks, said, during=error.during, flows=flow_lists)


def _broken(kind: Kind, hosts: tuple[str, ...], ranks: Sequence[int], said: str, **evidence: Any) -> Finding:
    return Finding(
        kind=kind, hosts=hosts, ranks=tuple(ranks), confidence=_BROKEN_CONFIDENCE, evidence=evidence, sentence=said
    )


def _hosts_of(session: Session, ranks: Sequence[int]) -> tuple[str, ...]:
    """Of ranks that are endpoints. The hosts of others are not known here."""
    names = {endpoint.rank: endpoint.host for endpoint in session.endpoints}
    return tuple(dict.fromkeys(names[rank] for rank in ranks if rank in names))


def _beta(session: Session) -> float | None:
    if len(session.seen):
        return float(np.exp(-np.median(session.seen.log_rates)))
    return session.beta_s_per_byte


def _details(session: Session) -> dict[str, Any]:
    hosts = [endpoint.host for endpoint in session.endpoints]
    details: dict[str, Any] = {"hosts": hosts}
    if len(session.seen):
        rates = session.seen.matrix()
        details["pairs_bytes_per_s"] = [[None if np.isnan(rate) else float(rate) for rate in row] for row in rates]
        details["noise_share"] = session.seen.noise()
        details["transfer_bytes"] = session.num_bytes
    if session.compute_s is not None:
        details["compute_s"] = dict(zip(hosts, map(float, session.compute_s)))
    leaves = dict.fromkeys(endpoint.leaf for endpoint in session.endpoints if endpoint.leaf is not None)
    if leaves:
        details["groups"] = [[end.host for end in session.endpoints if end.leaf == leaf] for leaf in leaves]
    return details
