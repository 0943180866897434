"""What each drawing and table shows, taken from plain data. Pure: no drawing here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.fabric.findings import Finding
from cluster.fabric.report.data import Plain

HEAT_STEPS = (0.95, 0.9, 0.8, 0.65, 0.5, 0.3)
"""Shares of the median rate at which a pair gets the next darker colour."""
MOST_LEAVES = 8
MOST_HOSTS = 64
"""Of a larger fabric, a drawing shows as many: those that something was found of come first."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Rates between hosts."""

    names: tuple[str, ...]
    rates: NDArray[np.float64]
    """(n, n) bytes a second, row sends to column; NaN where nothing was measured."""

    @property
    def median(self) -> float:
        """Of all measured pairs."""
        return float(np.nanmedian(self.rates))

    def heat(self) -> NDArray[np.intp]:
        """(n, n) from 0, as fast as the median or faster, to len(HEAT_STEPS), very slow; -1 where nothing was measured."""
        share = self.rates / self.median
        steps = np.sum(share[..., None] < np.array(HEAT_STEPS), axis=-1)
        return np.where(np.isnan(share), -1, steps)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Bus bandwidth over size of one kind of collective, on one set of groups, in one mode."""

    kind: str
    mode: str
    sizes: tuple[int, ...]
    busbw: tuple[float, ...]
    """Bytes a second."""
    all_correct: bool


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A switch and the hosts below it, as they are shown."""

    name: str
    hosts: tuple[str, ...]
    num_hidden: int
    """Hosts that nothing was found of and that have no room."""
    congested: frozenset[str]
    """Directions in which its uplinks are: `out` of the leaf, `in` to it."""


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """The topology with what was found marked in it."""

    leaves: tuple[Leaf, ...]
    num_hidden_leaves: int
    marks: Mapping[str, tuple[str, ...]]
    """Kinds of findings by host, without paths and uplinks."""
    paths: tuple[tuple[str, str], ...]
    """Sender and receiver of each bad path."""

    @property
    def hosts(self) -> tuple[str, ...]:
        """Those that are shown."""
        return tuple(host for leaf in self.leaves for host in leaf.hosts)


def findings_of(verdict: Plain | None) -> tuple[Finding, ...]:
    """The findings of a verdict's data; none without a verdict."""
    return tuple(Finding.from_data(finding) for finding in (verdict or {}).get("findings", ()))


def hosts_of_kind(verdict: Plain | None, kind: str) -> frozenset[str]:
    """Hosts that findings of that kind name."""
    return frozenset(host for finding in findings_of(verdict) if finding.kind == kind for host in finding.hosts)


def named_hosts(verdict: Plain | None) -> frozenset[str]:
    """Hosts that any finding names."""
    return frozenset(host for finding in findings_of(verdict) for host in finding.hosts)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names without the domain that all share and, where they are long, without the start that all share."""
    first = {name: name.split(".")[0] for name in names}
    if len(set(first.values())) < len(set(names)):
        first = {name: name for name in names}
    # The least and the greatest of sorted names differ first where any two of them do.
    ends = zip(min(first.values(), default=""), max(first.values(), default=""))
    common = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], ends)).rstrip("0123456789")
    if len(first) > 1 and max(map(len, first.values())) > 10 and len(common) > 3:
        return {name: short[len(common) :] for name, short in first.items()}
    return first


def pairs_of(verdict: Plain | None) -> Pairs | None:
    """The pair matrix of a verdict; None where it has none."""
    details = (verdict or {}).get("details", {})
    names, matrix = details.get("hosts"), details.get("pairs_bytes_per_s")
    if not names or not matrix:
        return None
    rates = np.array([[np.nan if rate is None else rate for rate in row] for row in matrix], dtype=np.float64)
    if np.isnan(rates).all():
        return None
    return Pairs(names=tuple(names), rates=rates)


def medians(rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) of each row of (n, n), NaN where it has nothing. Of the transposed matrix: of what each receives."""
    return np.array([np.median(known) if (known := row[~np.isnan(row)]).size else np.nan for row in rates])


def slowest_part(pairs: Pairs, most: int) -> Pairs:
    """At most `most` hosts: those with the slowest median, as sender or as receiver, and then the slowest single pair."""
    count = len(pairs.names)
    if count <= most:
        return pairs
    known = np.nan_to_num(np.concatenate([pairs.rates, pairs.rates.T], axis=1), nan=np.inf)
    ways = np.fmin(medians(pairs.rates), medians(pairs.rates.T))
    shown = sorted(np.lexsort((np.arange(count), known.min(axis=1), np.nan_to_num(ways, nan=np.inf)))[:most])
    return Pairs(names=tuple(pairs.names[host] for host in shown), rates=pairs.rates[np.ix_(shown, shown)])


def fabric_of(verdict: Plain | None) -> Fabric | None:
    """The topology that a verdict knows of; None where it names no hosts."""
    details = (verdict or {}).get("details", {})
    if not details.get("hosts"):
        return None
    findings = findings_of(verdict)
    marks: dict[str, tuple[str, ...]] = {}
    for finding in findings:
        if finding.kind not in ("bad_path", "congested_uplink"):
            for host in finding.hosts:
                marks[host] = tuple(dict.fromkeys((*marks.get(host, ()), finding.kind)))
    paths = tuple((finding.hosts[0], finding.hosts[-1]) for finding in findings if finding.kind == "bad_path")
    crossings = [_crossing(finding) for finding in findings if finding.kind == "congested_uplink"]
    # A rank that never came has a host that was never measured.
    hosts = list(dict.fromkeys([*details["hosts"], *marks]))
    groups = _groups(hosts, details.get("groups") or _sides(findings))
    wanted = {*marks, *(host for path in paths for host in path)}
    leaves = _laid_out(groups, wanted, crossings)
    return Fabric(leaves=tuple(leaves), num_hidden_leaves=len(groups) - len(leaves), marks=marks, paths=paths)


def _sides(findings: Sequence[Finding]) -> list[list[str]]:
    """The two sides of a congested uplink: what is known of the switches where nobody has told."""
    sides = [[finding.evidence.get(key, []) for key in ("from_hosts", "to_hosts")] for finding in findings]
    return next((side for side in sides if all(side)), [])


def _crossing(finding: Finding) -> dict[str, frozenset[str]]:
    """Hosts whose traffic out of their leaf is congested, and whose traffic in; all in both where it is not said."""
    senders = frozenset(finding.evidence.get("from_hosts", finding.hosts))
    receivers = frozenset(finding.evidence.get("to_hosts", finding.hosts))
    if finding.evidence.get("both_ways", False):
        senders = receivers = senders | receivers
    return {"out": senders, "in": receivers}


def _groups(hosts: Sequence[str], groups: Sequence[Sequence[str]]) -> list[tuple[str, list[str]]]:
    """Name and hosts of each leaf; one switch with all hosts where nothing shows which of them share one."""
    named = [(f"leaf {number}", list(dict.fromkeys(members))) for number, members in enumerate(groups)]
    known = {host for _, members in named for host in members}
    if rest := [host for host in hosts if host not in known]:
        named.append(("elsewhere" if named else "switch", rest))
    return named


def _laid_out(
    groups: Sequence[tuple[str, list[str]]], wanted: set[str], crossings: Sequence[Mapping[str, frozenset[str]]]
) -> list[Leaf]:
    """All leaves and hosts where there is room; else those with findings, and a few healthy ones beside them."""
    num_hosts = sum(len(members) for _, members in groups)
    congested = [
        frozenset(way for crossing in crossings for way, hosts in crossing.items() if _most(members, hosts))
        for _, members in groups
    ]
    shown, room = list(range(len(groups))), num_hosts
    if num_hosts > MOST_HOSTS:
        interest = [len(wanted.intersection(members)) + len(ways) for (_, members), ways in zip(groups, congested)]
        shown = sorted(sorted(shown, key=lambda number: (-interest[number], number))[:MOST_LEAVES])
        room = MOST_HOSTS // len(shown)
    leaves = []
    for number in shown:
        name, members = groups[number]
        first = sorted(range(len(members)), key=lambda place: (members[place] not in wanted, place))
        kept = tuple(members[place] for place in sorted(first[:room]))
        leaves.append(Leaf(name=name, hosts=kept, num_hidden=len(members) - len(kept), congested=congested[number]))
    return leaves


def _most(members: Sequence[str], hosts: Collection[str]) -> bool:
    return 2 * len(set(hosts).intersection(members)) > len(members)


def curves_of(sweep: Plain | None) -> dict[str, list[Curve]]:
    """Curves by the name of the set of groups, in the order of the sweep."""
    points: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in (sweep or {}).get("rows", ()):
        points.setdefault((row["group"], row["kind"], row["mode"]), []).append(row)
    curves: dict[str, list[Curve]] = {}
    for (group, kind, mode), rows in points.items():
        rows = sorted(rows, key=lambda row: row["num_bytes"])
        curves.setdefault(group, []).append(
            Curve(
                kind=kind,
                mode=mode,
                sizes=tuple(row["num_bytes"] for row in rows),
                busbw=tuple(row["busbw_bytes_per_s"] for row in rows),
                all_correct=all(row["correct"] for row in rows),
            )
        )
    return curves


def compute_of(verdict: Plain | None) -> dict[str, float]:
    """Seconds of the same piece of work, by host."""
    details = (verdict or {}).get("details", {})
    times = details.get("compute_s") or {}
    if not isinstance(times, Mapping):
        times = dict(zip(details.get("hosts", ()), times))
    return {host: seconds for host, seconds in times.items() if seconds is not None}


@dataclass(frozen=True, kw_only=True)
class Waits:
    """What a run waited for, over its steps."""

    steps: tuple[int, ...]
    by_axis: Mapping[str, tuple[float, ...]]
    """Seconds a step that ranks stood still for collectives of an axis; NaN where nothing was recorded."""
    network: Mapping[str, tuple[float, ...]]
    """Of the same, what collectives take when nobody is late."""
    ranks: tuple[int, ...]
    late: NDArray[np.float64]
    """(ranks, steps) seconds a step that the others waited for each rank; NaN where nothing was recorded."""
    onsets: tuple[tuple[int, str], ...]
    """Steps from which findings hold, and whom they name."""


def waits_of(records: Sequence[Plain], verdict: Plain | None = None) -> Waits | None:
    """The timeline of a monitor's records; None without any. Findings of the verdict that tell since when are marked."""
    if not records:
        return None
    records = sorted(records, key=lambda record: record["step"])
    ranks = sorted({int(rank) for record in records for rank in record.get("late_s", {})})
    late = [[record.get("late_s", {}).get(str(rank), np.nan) for record in records] for rank in ranks]
    onsets = {
        (finding.evidence["since_step"], ", ".join([f"rank {rank}" for rank in finding.ranks] or finding.hosts))
        for finding in findings_of(verdict)
        if finding.evidence.get("since_step") is not None
    }
    return Waits(
        steps=tuple(record["step"] for record in records),
        by_axis=_series(records, "wait_s"),
        network=_series(records, "network_s"),
        ranks=tuple(ranks),
        late=np.array(late, dtype=np.float64).reshape(len(ranks), len(records)),
        onsets=tuple(sorted(onsets)),
    )


def _series(records: Sequence[Plain], key: str) -> dict[str, tuple[float, ...]]:
    axes = dict.fromkeys(axis for record in records for axis in record.get(key, {}))
    return {axis: tuple(record.get(key, {}).get(axis, np.nan) for record in records) for axis in axes}
