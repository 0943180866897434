"""In what ranks differ, and who of them is wrong. Pure comparisons. Imports without torch.

Where ranks differ, more than half of them are right. The hosts of the others are bad, unless that leaves no host at all, or there
is no such half: then nobody can say who is wrong, and the finding names no bad host.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.fabric.analysis.sentences import names_in_words
from cluster.preflight.verdict import PreflightFinding, PreflightKind, Severity

Hosts = Mapping[int, str]
"""Host of each rank."""
MOST_NAMED = 4
"""In a sentence. The evidence has all."""
_LONGEST_VALUE = 120
_TRAINS_WITH = re.compile(
    r"(torch|triton|numpy|pydantic|pydantic-core|safetensors|tokenizers|transformers|datasets|deepspeed|mpi4py)$"
    r"|pytorch-triton|nvidia-(?!ml-py)"
)
"""Distributions whose code computes, communicates, or reads data and configurations in a rank."""


@dataclass(frozen=True, kw_only=True)
class Topic:
    """What a set of names and values is about, and how a difference in it is told."""

    kind: PreflightKind
    what: str
    """Completes "n3 differs in ...", for one and for more: "version of {}", with the names in place of {}."""
    mend: str
    absent: str = "not there"
    """Of a value that a rank lacks."""
    tells_values: bool = True
    """Whether values mean something to people."""
    severity: Severity = "error"
    """Of a difference."""


VERSIONS = Topic(
    kind="version", what="the version of {}", mend="Install the same on all hosts, or use one container image."
)
PACKAGES = Topic(
    kind="package",
    what="the installed package {}",
    mend="Install the same on all hosts, or use one container image.",
    absent="not installed",
)
OTHER_PACKAGES = replace(PACKAGES, severity="warning")
"""Those that no rank computes with: an editor's tools on one host harm nobody."""
SOURCES = Topic(
    kind="source",
    what="the source file {}",
    mend="Put the same source on all hosts; an editable install must lie on a shared file system.",
    tells_values=False,
)
ENVIRONMENT = Topic(
    kind="environment",
    what="the variable {}",
    mend="Set it for all ranks alike, or for none; look at the host's shell and module files.",
    absent="not set",
)
DEVICES = Topic(kind="device", what="the device: {}", mend="Use hosts of one kind, and look at nvidia-smi there.")
DRIVERS = replace(DEVICES, severity="warning")
"""What may differ in a cluster that is renewed host by host, and trains."""
NETWORK = Topic(kind="network", what="the network: {}", mend="Look at ibstat, at cables and at switch ports there.")
TOPICS: Mapping[str, Topic] = {
    "versions": VERSIONS,
    "sources": SOURCES,
    "environment": ENVIRONMENT,
}


def section_differences(section: str, values: Mapping[int, Mapping[str, str]], hosts: Hosts) -> list[PreflightFinding]:
    """`differences` in a section of what ranks say of themselves. Of packages those that ranks train with are errors."""
    if section != "packages":
        return differences(values, hosts, TOPICS[section])
    kinds: list[dict[int, dict[str, str]]] = [
        {
            rank: {name: version for name, version in told.items() if bool(_TRAINS_WITH.match(name)) == trains}
            for rank, told in values.items()
        }
        for trains in (True, False)
    ]
    return [*differences(kinds[0], hosts, PACKAGES), *differences(kinds[1], hosts, OTHER_PACKAGES)]


def differences(values: Mapping[int, Mapping[str, str]], hosts: Hosts, topic: Topic) -> list[PreflightFinding]:
    """A finding for each set of ranks that differ from more than half of all, with all names in which they do; and one for all
    names in which nobody can say who is right.

    values: by rank, of some ranks; one that lacks a name differs from those that have it.
    """
    by_deviants: dict[tuple[int, ...] | None, dict[str, dict[int, str]]] = {}
    for name in sorted({name for told in values.values() for name in told}):
        told = {rank: values[rank].get(name, topic.absent) for rank in sorted(values)}
        if len(set(told.values())) > 1:
            usual = clear_majority(list(told.values()))
            deviants = None if usual is None else tuple(rank for rank, value in told.items() if value != usual)
            by_deviants.setdefault(deviants, {})[name] = told
    return [
        _undecided(differing, hosts, topic) if deviants is None else _deviating(deviants, differing, hosts, topic)
        for deviants, differing in by_deviants.items()
    ]


def clear_majority(values: Sequence[str]) -> str | None:
    """The value that more than half have; None where there is none."""
    value, count = Counter(values).most_common(1)[0]
    return value if 2 * count > len(values) else None


def without_all(culprits: Sequence[str], hosts: Hosts) -> tuple[str, ...]:
    """The culprits, or nobody where these are all hosts: what all have is no host's own fault, or there is none beside it."""
    named = tuple(dict.fromkeys(culprits))
    return () if set(named) >= set(hosts.values()) else named


def who(ranks: Sequence[int], hosts: Hosts) -> str:
    """Hosts in words, with ranks where not all of a host's are meant."""
    words = []
    for host in dict.fromkeys(hosts[rank] for rank in ranks):
        own = [rank for rank in ranks if hosts[rank] == host]
        all_of_host = sum(name == host for name in hosts.values())
        number = "rank" if len(own) == 1 else "ranks"
        words.append(host if len(own) == all_of_host else f"{host} ({number} {', '.join(map(str, own))})")
    return names_in_words(words)


def _deviating(
    deviants: tuple[int, ...], differing: Mapping[str, Mapping[int, str]], hosts: Hosts, topic: Topic
) -> PreflightFinding:
    names = tuple(dict.fromkeys(hosts[rank] for rank in deviants))
    said = []
    for told in differing.values():
        usual = clear_majority(list(told.values()))
        here = names_in_words(list(dict.fromkeys(_short(told[rank]) for rank in deviants)))
        said.append(f"{here} there, and {_short(usual or '')} elsewhere")
    whom = f"{who(deviants, hosts)} differ{'s' * (len(deviants) == 1 or len(names) == 1)} from the others"
    return PreflightFinding(
        kind=topic.kind,
        hosts=names,
        ranks=deviants,
        bad_hosts=without_all(names, hosts) if topic.severity == "error" else (),
        severity=topic.severity,
        sentence=f"{whom} in {_listing(differing, said, topic)}. {topic.mend}",
        evidence=_evidence(differing, hosts),
    )


def _undecided(differing: Mapping[str, Mapping[int, str]], hosts: Hosts, topic: Topic) -> PreflightFinding:
    ranks = tuple(sorted({rank for told in differing.values() for rank in told}))
    said = []
    for told in differing.values():
        values = list(dict.fromkeys(told.values()))
        parts = []
        for value in values:
            holders = [rank for rank, own in told.items() if own == value]
            parts.append(f"{_short(value)} on {who(holders, hosts)}")
        said.append(names_in_words(parts, MOST_NAMED))
    return PreflightFinding(
        kind=topic.kind,
        hosts=tuple(dict.fromkeys(hosts[rank] for rank in ranks)),
        ranks=ranks,
        severity=topic.severity,
        sentence=f"Ranks differ, and nobody can say which are right, in {_listing(differing, said, topic)}. {topic.mend}",
        evidence=_evidence(differing, hosts),
    )


def _listing(differing: Mapping[str, Mapping[int, str]], said: Sequence[str], topic: Topic) -> str:
    """The first few names with what is said of each."""
    parts = [f"{name} ({words})" if topic.tells_values else name for name, words in zip(differing, said)]
    return topic.what.format(names_in_words(parts, MOST_NAMED))


def _evidence(differing: Mapping[str, Mapping[int, str]], hosts: Hosts) -> dict[str, Any]:
    """For each name, its values with the hosts that have each."""
    evidence: dict[str, Any] = {}
    for name, told in differing.items():
        holders: dict[str, list[str]] = {}
        for rank, value in told.items():
            if hosts[rank] not in holders.setdefault(value, []):
                holders[value].append(hosts[rank])
        evidence[name] = holders
    return evidence


def _short(value: str) -> str:
    return (value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}...") or '""'
