"""Findings in words: one sentence each, with the numbers it rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.fabric.findings import Kind


def rate_in_words(bytes_per_s: float) -> str:
    """Bits a second, as network people count: `48.0 Mbit/s`."""
    bits = 8.0 * bytes_per_s
    for size, unit in ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")):
        if bits >= size:
            return f"{bits / size:.1f} {unit}"
    return f"{bits:.0f} bit/s"


def time_in_words(seconds: float) -> str:
    """`1.20 s`, `35.0 ms` or `12.0 us`."""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def names_in_words(hosts: Sequence[str], most: int = 8) -> str:
    """`h0, h1 and h2`, or the first few and how many more; `nobody` where there are none."""
    if not hosts:
        return "nobody"
    if len(hosts) > most:
        return f"{', '.join(hosts[:most])} and {len(hosts) - most} more"
    return hosts[0] if len(hosts) == 1 else f"{', '.join(hosts[:-1])} and {hosts[-1]}"


def sentence(kind: Kind, hosts: Sequence[str], evidence: Mapping[str, Any], confidence: float) -> str:
    """What is wrong, in one sentence. `evidence`: as the finding carries it."""
    certain = f" (confidence {confidence:.2f})."
    match kind:
        case "slow_host":
            slow, well = time_in_words(evidence["compute_s"]), time_in_words(evidence["control_compute_s"])
            return f"{hosts[0]} computes slowly: {slow} for work that takes its peers {well}" + certain
        case "slow_sender" | "slow_receiver" | "slow_link":
            return _slow_link(kind, hosts[0], evidence) + certain
        case "bad_path":
            ways = "in both directions" if evidence["both_ways"] else "in this direction alone"
            return (
                f"The path from {hosts[0]} to {hosts[1]} is bad {ways}: {_rates(evidence)}, while both do well with others"
                + certain
            )
        case "congested_uplink":
            return (
                _congested(evidence) if evidence.get("leaves_known", True) else _together(hosts, evidence)
            ) + certain
    return f"{names_in_words(hosts)}: {kind}" + certain


def _rates(evidence: Mapping[str, Any], prefix: str = "") -> str:
    slow, well = evidence[f"{prefix}bytes_per_s"], evidence[f"{prefix}control_bytes_per_s"]
    return f"{rate_in_words(slow)} against {rate_in_words(well)}"


def _slow_link(kind: Kind, host: str, evidence: Mapping[str, Any]) -> str:
    if kind == "slow_link":
        said = f"{host} sends and receives slowly: {rate_in_words(evidence['outwards_bytes_per_s'])} out of it and "
        said += f"{_rates(evidence, 'inwards_')} of its peers into it: its link or NIC"
    else:
        way, prefix = ("sends", "outwards_") if kind == "slow_sender" else ("receives", "inwards_")
        said = f"{host} {way} slowly: {_rates(evidence, prefix)} of its peers at the same time, and is not slow the other way"
        said += ": its outgoing link or NIC" if kind == "slow_sender" else ": its incoming link or NIC"
    if evidence["congested"]:
        said += ", congested by foreign traffic (packets queue in it while our flows rest)"
    return said


def _congested(evidence: Mapping[str, Any]) -> str:
    groups = f"{names_in_words(evidence['from_hosts'])} and {names_in_words(evidence['to_hosts'])}"
    way = "between" if evidence["both_ways"] else "from the first to the second of"
    return f"The uplink is congested {way} {groups}: {_rates(evidence)} within them; {evidence['competitors_in_words']}"


def _together(hosts: Sequence[str], evidence: Mapping[str, Any]) -> str:
    way = "send" if hosts[0] in evidence["from_hosts"] else "receive"
    ways = "send and receive" if evidence["both_ways"] else way
    said = (
        f"{names_in_words(hosts)} {ways} slowly, all of them: {_rates(evidence)} of others: rather something that they "
    )
    return said + "share, such as a congested uplink, than each of them; which leaf switch a host hangs on is not known"
