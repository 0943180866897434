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
MOST_HOSTS = 64
"""Of a larger fabric, a drawing shows as many: those that something was found of come first."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Rates between hosts."""

    names: tuple[str, ...]
    rates: NDArray[np.float64]
    """(n, n) bytes a second, row sends to column; NaN where nothing was measured."""
    num_hosts: int
    """Of the whole fabric, shown or not."""

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
    congested: bool


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
    """The pair matrix of a verdict, of a large fabric the part that tells most; None where it has none."""
    details = (verdict or {}).get("details", {})
    names, matrix = details.get("hosts"), details.get("pairs_bytes_per_s")
    if not names or not matrix:
        return None
    rates = np.array([[np.nan if rate is None else rate for rate in row] for row in matrix], dtype=np.float64)
    if np.isnan(rates).all():
        return None
    named = {host for finding in findings_of(verdict) for host in finding.hosts}
    pairs = most_telling(Pairs(names=tuple(names), rates=rates, num_hosts=len(names)), MOST_HOSTS, named=named)
    return None if np.isnan(pairs.rates).all() else pairs


def most_telling(pairs: Pairs, most: int, *, named: Collection[str] = ()) -> Pairs:
    """At most `most` hosts: the named, then those with the slowest median, as sender or as receiver, then single pair."""
    count = len(pairs.names)
    if count <= most:
        return pairs
    known = np.where(np.isnan(pairs.rates), np.inf, pairs.rates)
    both = np.concatenate([known, known.T], axis=1)
    slowest = both.min(axis=1)
    ways = np.minimum(_medians(pairs.rates), _medians(pairs.rates.T))
    unnamed = np.array([name not in named for name in pairs.names])
    shown = sorted(np.lexsort((np.arange(count), slowest, ways, unnamed))[:most])
    return Pairs(
        names=tuple(pairs.names[host] for host in shown),
        rates=pairs.rates[np.ix_(shown, shown)],
        num_hosts=pairs.num_hosts,
    )


def _medians(rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) of each row; infinite where it has nothing."""
    return np.array([np.median(known) if (known := row[~np.isnan(row)]).size else np.inf for row in rates])


def fabric_of(verdict: Plain | None) -> Fabric | None:
    """The topology that a verdict knows of; None where it names no hosts."""
    details = (verdict or {}).get("details", {})
    hosts = details.get("hosts")
    if not hosts:
        return None
    findings = findings_of(verdict)
    marks: dict[str, tuple[str, ...]] = {}
    for finding in findings:
        if finding.kind not in ("bad_path", "congested_uplink"):
            for host in finding.hosts:
                marks[host] = (*marks.get(host, ()), finding.kind)
    paths = tuple((finding.hosts[0], finding.hosts[-1]) for finding in findings if finding.kind == "bad_path")
    crossing = [set(finding.hosts) for finding in findings if finding.kind == "congested_uplink"]
    wanted = {*marks, *(host for path in paths for host in path)}
    return _laid_out(_groups(hosts, details.get("groups")), wanted, crossing, marks, paths)


def _groups(hosts: Sequence[str], groups: Any) -> list[tuple[str, list[str]]]:
    """Name and hosts of each leaf; one leaf with all hosts where nothing shows which share a switch."""
    if isinstance(groups, Mapping):
        named = [(str(name), list(members)) for name, members in groups.items()]
    else:
        named = [(f"leaf {number}", list(members)) for number, members in enumerate(groups or [])]
    known = {host for _, members in named for host in members}
    rest = [host for host in hosts if host not in known]
    if rest:
        named.append(("switch" if not named else "elsewhere", rest))
    return named


def _laid_out(
    groups: Sequence[tuple[str, list[str]]],
    wanted: set[str],
    crossing: Sequence[set[str]],
    marks: Mapping[str, tuple[str, ...]],
    paths: tuple[tuple[str, str], ...],
) -> Fabric:
    """All leaves and hosts where there is room; else those with findings, and a few healthy ones beside them."""
    num_hosts = sum(len(members) for _, members in groups)
    shown = list(groups)
    if num_hosts > MOST_HOSTS:
        most_leaves = 8
        interest = [
            len(wanted & set(members)) + sum(_most(members, hosts) for hosts in crossing) for _, members in groups
        ]
        order = sorted(range(len(groups)), key=lambda number: (-interest[number], number))[:most_leaves]
        shown = [groups[number] for number in sorted(order)]
    room = max(MOST_HOSTS // max(len(shown), 1), 1) if num_hosts > MOST_HOSTS else num_hosts
    leaves = []
    for name, members in shown:
        first = sorted(range(len(members)), key=lambda place: (members[place] not in wanted, place))
        kept = [members[place] for place in sorted(first[:room])]
        leaves.append(
            Leaf(
                name=name,
                hosts=tuple(kept),
                num_hidden=len(members) - len(kept),
                congested=any(_most(members, hosts) for hosts in crossing),
            )
        )
    return Fabric(leaves=tuple(leaves), num_hidden_leaves=len(groups) - len(shown), marks=marks, paths=paths)


def _most(members: Sequence[str], hosts: set[str]) -> bool:
    return 2 * len(hosts.intersection(members)) > len(members)


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
    ranks: tuple[int, ...]
    late: NDArray[np.float64]
    """(ranks, steps) seconds a step that the others waited for each rank; NaN where nothing was recorded."""


def waits_of(records: Sequence[Plain]) -> Waits | None:
    """The timeline of a monitor's records; None without any."""
    if not records:
        return None
    records = sorted(records, key=lambda record: record["step"])
    axes = dict.fromkeys(axis for record in records for axis in record.get("wait_s", {}))
    ranks = sorted({int(rank) for record in records for rank in record.get("late_s", {})})
    late = [[record.get("late_s", {}).get(str(rank), np.nan) for record in records] for rank in ranks]
    return Waits(
        steps=tuple(record["step"] for record in records),
        by_axis={axis: tuple(record.get("wait_s", {}).get(axis, np.nan) for record in records) for axis in axes},
        ranks=tuple(ranks),
        late=np.array(late, dtype=np.float64).reshape(len(ranks), len(records)),
    )
