"""Counters of the kernel's network stack and of Ethernet NICs, in the network namespace of the calling process."""

from __future__ import annotations

import json
import re

from cluster.fabric.counters.snapshot import Count, Snapshot
from cluster.fabric.counters.sources import Sources

_NETSTAT = {
    "TcpExt": (
        "TCPTimeouts",
        "TCPLostRetransmit",
        "TCPDeliveredCE",
        "TCPOFOQueue",
        "TCPRcvQDrop",
        "TCPBacklogDrop",
        "TCPToZeroWindowAdv",
        "PruneCalled",
    ),
    "IpExt": ("InCEPkts",),
}
_SNMP = {"Tcp": ("InSegs", "OutSegs", "RetransSegs", "InCsumErrors"), "Udp": ("RcvbufErrors", "InCsumErrors")}
_STATISTICS = (
    *(f"{way}_{what}" for way in ("rx", "tx") for what in ("bytes", "packets", "errors", "dropped")),
    "rx_crc_errors",
    "rx_fifo_errors",
    "rx_missed_errors",
    "tx_carrier_errors",
)
_PROC_NET_DEV = {0: "rx_bytes", 1: "rx_packets", 2: "rx_errors", 3: "rx_dropped"} | {
    8: "tx_bytes",
    9: "tx_packets",
    10: "tx_errors",
    11: "tx_dropped",
}
_ETHTOOL = re.compile(
    r"^\s*((?:rx|tx)_(?:prio\d+|global)_pause|rx_prio\d+_buf_discard|rx_discards_phy|rx_out_of_buffer"
    r"|outbound_pci_stalled_(?:rd|wr)|rx_(?:crc_errors|symbol_err|corrected_bits)_phy|link_down_events_phy):\s*(\d+)$",
    re.MULTILINE,
)


def read(sources: Sources) -> Snapshot:
    """`tcp/host/...`, `udp/host/...`, `ip/host/...`, `softnet/host/...`, `net/<device>/...`, `ethtool/<device>/...` and
    `qdisc/<device>/...`. Loopback is left out: no fault of a fabric shows there."""
    counts = _protocols(sources) | _softnet(sources) | _qdiscs(sources)
    states: dict[str, float] = {}
    from_proc = _proc_net_dev(sources)
    shown = sources.names("sys/class/net")
    # A process that entered a network namespace alone still sees the devices of its old one below /sys.
    if set(shown) - {"bonding_masters"} == from_proc.keys():
        for device in shown:
            folder = f"sys/class/net/{device}"
            if device == "lo" or not sources.has(f"{folder}/statistics"):
                continue
            figures = {name: sources.number(f"{folder}/statistics/{name}") or 0 for name in _STATISTICS}
            if not figures["rx_bytes"] + figures["tx_bytes"]:
                continue  # never used
            counts |= _named(f"net/{device}", figures)
            if (falls := sources.number(f"{folder}/carrier_down_count")) is not None:
                counts[f"net/{device}/carrier_down_count"] = Count(value=falls)
            if sources.has(f"{folder}/device"):  # a NIC, no bridge or tunnel
                states |= _link_states(sources, device)
                counts |= _ethtool(sources, device)
    else:
        for device, figures in from_proc.items():
            if device != "lo":
                counts |= _named(f"net/{device}", figures)
    return Snapshot(counts=counts, states=states)


def _named(prefix: str, figures: dict[str, int]) -> dict[str, Count]:
    return {f"{prefix}/{name}": Count(value=value) for name, value in figures.items()}


def _protocols(sources: Sources) -> dict[str, Count]:
    counts: dict[str, Count] = {}
    for path, wanted in (("proc/net/snmp", _SNMP), ("proc/net/netstat", _NETSTAT)):
        lines = sources.text(path).splitlines()
        # Two lines a protocol: `Tcp: <names>` and `Tcp: <values>`.
        for names, values in zip(lines[::2], lines[1::2]):
            protocol = names.partition(":")[0]
            area = protocol.removesuffix("Ext").lower()
            for name, value in zip(names.split(), values.split()):
                if name in wanted.get(protocol, ()):
                    counts[f"{area}/host/{name}"] = Count(value=int(value))
    return counts


def _softnet(sources: Sources) -> dict[str, Count]:
    """Packets that the kernel dropped since its queue of received packets was full, summed over cores (column 2, hex)."""
    rows = [line.split() for line in sources.text("proc/net/softnet_stat").splitlines()]
    return {"softnet/host/dropped": Count(value=sum(int(row[1], 16) for row in rows))} if rows else {}


def _proc_net_dev(sources: Sources) -> dict[str, dict[str, int]]:
    devices: dict[str, dict[str, int]] = {}
    for line in sources.text("proc/net/dev").splitlines()[2:]:
        device, _, figures = line.partition(":")
        columns = [int(column) for column in figures.split()]
        devices[device.strip()] = {name: columns[index] for index, name in _PROC_NET_DEV.items()}
    return devices


def _link_states(sources: Sources, device: str) -> dict[str, float]:
    states = {}
    if operational := sources.text(f"sys/class/net/{device}/operstate").strip():
        states[f"net/{device}/is_down"] = float(operational == "down")
    megabits = sources.number(f"sys/class/net/{device}/speed")
    if megabits is not None and megabits > 0:  # -1 where the driver does not know
        states[f"net/{device}/rate_bytes_per_s"] = megabits * 1e6 / 8
    return states


def _ethtool(sources: Sources, device: str) -> dict[str, Count]:
    found = _ETHTOOL.findall(sources.answer("ethtool", "-S", device))
    return {f"ethtool/{device}/{name}": Count(value=int(value)) for name, value in found}


def _qdiscs(sources: Sources) -> dict[str, Count]:
    """What the queues of each device sent, dropped and held back; a device's queues are added up from their roots."""
    try:
        queues = json.loads(sources.answer("tc", "-j", "-s", "qdisc") or "[]")
    except json.JSONDecodeError:
        return {}
    totals: dict[str, int] = {}
    for queue in queues:
        # A root counts what its children do, and noqueue counts nothing.
        if queue.get("root") and queue.get("kind") != "noqueue":
            for counter in ("drops", "overlimits", "requeues"):
                name = f"qdisc/{queue.get('dev')}/{counter}"
                totals[name] = totals.get(name, 0) + int(queue.get(counter, 0))
    return {name: Count(value=value) for name, value in totals.items()}
