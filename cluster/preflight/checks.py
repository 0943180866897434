"""What speaks against training, from what all ranks said of themselves. Pure comparisons. Imports without torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.fabric.analysis.sentences import names_in_words
from cluster.fabric.findings import Finding, hosts_to_exclude
from cluster.preflight.differences import DEVICES, DRIVERS, MOST_NAMED, NETWORK, Hosts, differences, without_all
from cluster.preflight.verdict import PreflightFinding

_SLOW_DEVICE = 1.25
"""Times the median of all from which on a GPU is told to be slow. Its own best of many is compared, which repeats to a hundredth;
GPUs of one kind differ by some hundredths for good, and one that is throttled loses a third or more."""
_FEWEST_DEVICES = 3
_GB = 1e9


def device_findings(devices: Mapping[int, Mapping[str, Any]], hosts: Hosts) -> list[PreflightFinding]:
    """Of what each rank said of its device: wrong results, one that is slow, and differences."""
    wrong = [hosts[rank] for rank, device in devices.items() if device["error"]]
    findings = [
        PreflightFinding(
            kind="device",
            hosts=(hosts[rank],),
            ranks=(rank,),
            bad_hosts=(hosts[rank],) if without_all(wrong, hosts) else (),
            sentence=f"{hosts[rank]} computes wrongly on rank {rank}'s device ({_device_name(device)}): {device['error']}. "
            "Take it out of service.",
            evidence={"device": dict(device)},
        )
        for rank, device in sorted(devices.items())
        if device["error"]
    ]
    times = {rank: device["seconds"] for rank, device in sorted(devices.items()) if device["seconds"] is not None}
    if len(times) >= _FEWEST_DEVICES:
        usual = statistics.median(times.values())
        findings += [
            PreflightFinding(
                kind="slow_device",
                hosts=(hosts[rank],),
                ranks=(rank,),
                bad_hosts=(hosts[rank],),
                sentence=f"{hosts[rank]}: rank {rank}'s {_device_name(devices[rank])} takes {1e6 * seconds:,.0f} us for a "
                f"product that takes the others {1e6 * usual:,.0f} us. Look at its clocks, power and temperature.",
                evidence={"seconds": seconds, "usual_seconds": usual},
            )
            for rank, seconds in times.items()
            if seconds > _SLOW_DEVICE * usual
        ]
    told = {
        rank: {"GPUs": str(device["count"]), "kind of GPU": _device_name(device)} for rank, device in devices.items()
    }
    # They may differ from the others by nothing else than what has been told.
    told = {rank: told[rank] for rank in told if not devices[rank]["lacks"]}
    return [*_lacking_devices(devices, hosts), *findings, *differences(told, hosts, DEVICES)]


def _lacking_devices(devices: Mapping[int, Mapping[str, Any]], hosts: Hosts) -> list[PreflightFinding]:
    """Hosts whose ranks have no device as run.device asks, those with the same lack together."""
    lacking: dict[str, list[int]] = {}
    for rank, device in sorted(devices.items()):
        if device["lacks"]:
            lacking.setdefault(device["lacks"], []).append(rank)
    is_everywhere = not without_all([hosts[rank] for ranks in lacking.values() for rank in ranks], hosts)
    findings = []
    for what, ranks in lacking.items():
        names = tuple(dict.fromkeys(hosts[rank] for rank in ranks))
        mend = (
            "Lower launch.ranks_per_node."
            if devices[ranks[0]]["count"]
            else 'Set it to "auto" or "cpu", or take hosts whose GPUs `nvidia-smi` lists.'
        )
        findings.append(
            PreflightFinding(
                kind="device",
                hosts=names,
                ranks=tuple(ranks),
                bad_hosts=() if is_everywhere else names,
                sentence=f"{what} on {names_in_words(names, MOST_NAMED)}. {mend}",
                evidence={"lacks": what},
            )
        )
    return findings


def card_findings(cards: Mapping[int, Sequence[Mapping[str, str]]], hosts: Hosts) -> list[PreflightFinding]:
    """Of what nvidia-smi says on each host, by a rank of it: errors of memory, and differences between hosts.
    Drivers and modes of ECC that differ are a warning."""
    findings = []
    for rank, of_host in sorted(cards.items()):
        broken = {
            index: int(card["uncorrected"])
            for index, card in enumerate(of_host)
            if card["uncorrected"].isdecimal() and int(card["uncorrected"])
        }
        if broken:
            counts = names_in_words([f"{count} on GPU {index}" for index, count in broken.items()])
            findings.append(
                PreflightFinding(
                    kind="device",
                    hosts=(hosts[rank],),
                    ranks=(rank,),
                    bad_hosts=(hosts[rank],),
                    sentence=f"{hosts[rank]} has had errors of GPU memory that ECC could not correct: {counts}. Reset the GPU "
                    "or take it out of service.",
                    evidence={"uncorrected": {str(index): count for index, count in broken.items()}},
                )
            )
    listed = {rank: {"GPUs that nvidia-smi lists": str(len(of_host))} for rank, of_host in cards.items()}
    drivers = {
        rank: {"driver": _each(of_host, "driver"), "ECC": _each(of_host, "ecc")} for rank, of_host in cards.items()
    }
    return [*findings, *differences(listed, hosts, DEVICES), *differences(drivers, hosts, DRIVERS)]


def disk_findings(
    free_bytes: Mapping[int, int | None], hosts: Hosts, *, directory: str, least_bytes: float
) -> list[PreflightFinding]:
    """Hosts, by a rank of each, where less than `least_bytes` is free. Where it is so on all, the disk that they share is full,
    and no host is bad."""
    scarce = {rank: free for rank, free in sorted(free_bytes.items()) if free is not None and free < least_bytes}
    if not scarce:
        return []
    names = [hosts[rank] for rank in scarce]
    said = names_in_words([f"{free / _GB:.2f} GB on {hosts[rank]}" for rank, free in scarce.items()], MOST_NAMED)
    return [
        PreflightFinding(
            kind="disk",
            hosts=tuple(names),
            ranks=tuple(scarce),
            bad_hosts=without_all(names, hosts),
            sentence=f"Too little is free in {directory}: {said}; launch.preflight.min_free_disk_gb asks "
            f"for {least_bytes / _GB:g} GB. Free some, or set run.directory to another disk.",
            evidence={"free_bytes": {hosts[rank]: free for rank, free in scarce.items()}},
        )
    ]


def sharing_findings(problems: Mapping[int, str], hosts: Hosts, *, directory: str) -> list[PreflightFinding]:
    """Hosts, by a rank of each, with what they cannot do with the run's folder; empty where they can."""
    failed = {rank: problem for rank, problem in sorted(problems.items()) if problem}
    if not failed:
        return []
    names = [hosts[rank] for rank in failed]
    said = names_in_words([f"{hosts[rank]} {problem}" for rank, problem in failed.items()], MOST_NAMED)
    # The folder of the fewer is the other one.
    clear = 2 * len(failed) < len(problems)
    mend = (
        "Look at the mounts there."
        if clear
        else "Set run.directory to a file system that all hosts share and may write."
    )
    return [
        PreflightFinding(
            kind="shared_files",
            hosts=tuple(names),
            ranks=tuple(failed),
            bad_hosts=without_all(names, hosts) if clear else (),
            sentence=f"{directory} is not the same for all hosts: {said}. {mend}",
            evidence={hosts[rank]: problem for rank, problem in failed.items()},
        )
    ]


@dataclass(frozen=True, kw_only=True)
class ClockOffset:
    """Of a host's clock, ahead of rank 0's."""

    seconds: float
    uncertainty_s: float
    """Half the shortest round trip in which it was asked."""


def clock_findings(offsets: Mapping[int, ClockOffset], hosts: Hosts, *, most_s: float) -> list[PreflightFinding]:
    """Hosts, by a rank of each, whose clocks are further than `most_s` from those of the largest group of hosts that are not."""
    ordered = sorted(offsets, key=lambda rank: offsets[rank].seconds)
    groups = []
    for first, lowest in enumerate(ordered):
        slack = offsets[lowest].uncertainty_s
        groups.append(
            [
                rank
                for rank in ordered[first:]
                if offsets[rank].seconds - offsets[lowest].seconds <= most_s + slack + offsets[rank].uncertainty_s
            ]
        )
    agreeing = max(groups, key=len, default=[])
    away = sorted(set(offsets) - set(agreeing))
    if not away:
        return []
    is_clear = 2 * len(agreeing) > len(offsets)
    reference = statistics.median(offsets[rank].seconds for rank in agreeing)
    named = away if is_clear else sorted(offsets)
    shown = [f"{hosts[rank]} by {offsets[rank].seconds - reference:+.1f} s" for rank in named]
    names = [hosts[rank] for rank in named]
    return [
        PreflightFinding(
            kind="clock",
            hosts=tuple(names),
            ranks=tuple(named),
            bad_hosts=without_all(names, hosts) if is_clear else (),
            sentence=f"Clocks are apart: {names_in_words(shown, MOST_NAMED)}"
            f"{' from the others' if is_clear else ', and nobody can say which is right'}; "
            f"launch.preflight.max_clock_offset_seconds allows {most_s:g} s. Start the time service (chrony, ntpd) there.",
            evidence={"offset_s": {hosts[rank]: offsets[rank].seconds - reference for rank in named}},
        )
    ]


def network_findings(networks: Mapping[int, Mapping[str, Any]], hosts: Hosts) -> list[PreflightFinding]:
    """Hosts, by a rank of each, that lack the network that is asked for, or have another one than most. The speed of an
    interface counts where training itself uses it: elsewhere ranks only find one another by it."""
    lacking = {rank: network["error"] for rank, network in sorted(networks.items()) if network.get("error")}
    findings = [
        PreflightFinding(
            kind="network",
            hosts=(hosts[rank],),
            ranks=(rank,),
            bad_hosts=(hosts[rank],) if without_all([hosts[other] for other in lacking], hosts) else (),
            sentence=error,
            evidence={},
        )
        for rank, error in lacking.items()
    ]
    known = {rank: network for rank, network in networks.items() if "has" in network}
    told = {rank: {"ports": _ports_in_words(network)} for rank, network in known.items()}
    if all(network["kind"] == "socket" for network in known.values()):
        for rank, network in known.items():
            speed = network["interface_mbit"]
            told[rank]["speed of its interface"] = f"{speed} Mbit/s" if speed else "unknown"
    for finding in differences(told, hosts, NETWORK):
        unused = [
            f"{port} is not used on {hosts[rank]}: {reason}"
            for rank in finding.ranks
            for port, reason in networks[rank].get("left_out", {}).items()
        ]
        more = f" There {'; '.join(unused[:MOST_NAMED])}." if unused else ""
        findings.append(_with_sentence(finding, finding.sentence + more))
    return findings


def fabric_findings(findings: Sequence[Finding], hosts: Hosts) -> list[PreflightFinding]:
    """Those of a diagnosis. A congested uplink is a warning: it may be as wide as it was built, or others' traffic.

    A host is slow beside others, so more than half of them are not: the surest findings leave hosts out, up to that.
    """
    excluded = hosts_to_exclude(findings)
    known = dict.fromkeys(hosts.values())
    most = max(len(known) // 2, 1)
    told = []
    left_out: set[str] = set()
    for finding in findings:
        # Ranks of one host alone are endpoints with names of their own there.
        named = finding.hosts if len(known) > 1 else tuple(known)
        bad = [name for name in named if name in excluded]
        bad = list(without_all(bad, hosts)) if len(left_out | set(bad)) <= most or not left_out else []
        left_out |= set(bad)
        told.append(
            PreflightFinding(
                kind=finding.kind,
                severity="warning" if finding.kind == "congested_uplink" else "error",
                hosts=named,
                ranks=finding.ranks,
                bad_hosts=tuple(bad),
                sentence=finding.sentence,
                evidence={**finding.evidence, "confidence": finding.confidence},
            )
        )
    return told


def _with_sentence(finding: PreflightFinding, sentence: str) -> PreflightFinding:
    return PreflightFinding.from_data({**finding.as_data(), "sentence": sentence})


def _each(cards: Sequence[Mapping[str, str]], key: str) -> str:
    return ", ".join(sorted({card[key] for card in cards})) or "unknown"


def _device_name(device: Mapping[str, Any]) -> str:
    return device["name"] or "processor"


def _ports_in_words(network: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in sorted(network["has"].items())) or "none for RDMA"
