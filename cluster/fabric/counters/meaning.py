"""What it means when a counter grows: one table, the only place that knows.

Sources: the kernel's Documentation/ABI/stable/sysfs-class-infiniband and networking/snmp_counter; NVIDIA's "Understanding
mlx5 Linux Counters and Status Parameters" and "mlx5 ethtool counters"; RFC 3168 (ECN); nvml.h (why clocks are held back).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from cluster.fabric.findings import Kind

Meaning = Literal[
    "congested_ahead",
    "congested_before",
    "loss_out",
    "loss_in",
    "own_queue",
    "link",
    "link_in",
    "link_elsewhere",
    "corruption",
    "cannot_absorb",
    "peer_not_ready",
    "unreachable",
    "down",
    "throttled",
]
"""congested_ahead, congested_before: the network has no room for what this host sends; queues stand before this host.
loss_out, loss_in: of what it sends, of what it is sent. own_queue: it drops what it cannot send fast enough. link,
link_in: its own cable or NIC errs, on what comes in. link_elsewhere: a link further away errs. cannot_absorb: its memory or
processor is too slow for what arrives. peer_not_ready: the far host is. unreachable: no answer in time. down: the port is.
throttled: its processor or GPU is held back."""


@dataclass(frozen=True, kw_only=True)
class Signal:
    """A counter, or several that mean the same."""

    pattern: str
    """Of the full name, with `*` for devices and numbers."""
    meaning: Meaning
    says: str
    """What its growth says, as the second half of a sentence."""
    silence_tells: bool = False
    """Whether its standing still says that the thing did not happen. A TCP stack without ECN counts no marks: no."""
    share_of: str | None = None
    """Name of what it is a share of."""
    least_share: float = 0.0
    """Below this share it is everyday life."""
    only_beside_others: bool = False
    """It grows, or holds, on healthy hosts too, and only tells where it does so more than on others."""
    is_state: bool = False
    """It holds or does not; it is not counted."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What speaks for and against a finding of one kind."""

    supports: frozenset[Meaning]
    contradicts: frozenset[Meaning]
    expects: frozenset[Meaning] = frozenset()
    """Where counters of these are there, and all stand still, that speaks against it."""


def _infiniband(
    name: str, meaning: Meaning, says: str, *, silence_tells: bool = False, only_beside_others: bool = False
) -> Signal:
    return Signal(
        pattern=f"infiniband/*/{name}",
        meaning=meaning,
        says=says,
        silence_tells=silence_tells,
        only_beside_others=only_beside_others,
    )


def _nic(name: str, meaning: Meaning, says: str, *, silence_tells: bool = False) -> Signal:
    return Signal(pattern=name, meaning=meaning, says=says, silence_tells=silence_tells)


def _state(pattern: str, meaning: Meaning, says: str, *, is_fault: bool = False) -> Signal:
    """is_fault: wherever it holds, whatever others say; else an unused port of every host would be one."""
    return Signal(
        pattern=pattern,
        meaning=meaning,
        says=says,
        silence_tells=is_fault,
        only_beside_others=not is_fault,
        is_state=True,
    )


def _tcp(name: str, meaning: Meaning, says: str, *, share_of: str = "OutSegs") -> Signal:
    # One segment in a thousand is lost, or overtaken, on many a healthy network.
    return Signal(
        pattern=f"tcp/host/{name}", meaning=meaning, says=says, share_of=f"tcp/host/{share_of}", least_share=1e-3
    )


_INFINIBAND = (
    _infiniband("port_xmit_wait", "congested_ahead", "the port had data and no room ahead", silence_tells=True),
    _infiniband("rp_cnp_handled", "congested_ahead", "receivers told it to send slower", silence_tells=True),
    _infiniband("rp_cnp_ignored", "congested_ahead", "receivers told it to send slower, and it did not"),
    _infiniband(
        "np_ecn_marked_roce_packets", "congested_before", "a full queue marked packets to it", silence_tells=True
    ),
    _infiniband("np_cnp_sent", "congested_before", "it told its senders to slow down", silence_tells=True),
    _infiniband(
        "port_xmit_discards", "own_queue", "the port dropped packets: congestion ahead, or a port that is down"
    ),
    _infiniband("symbol_error", "link", "symbols were damaged on its cable"),
    _infiniband("link_error_recovery", "link", "its link had to train again"),
    _infiniband("link_downed", "link", "its link went down"),
    _infiniband("local_link_integrity_errors", "link", "its link erred beyond its threshold"),
    _infiniband("port_rcv_errors", "link_in", "damaged packets came in"),
    _infiniband("excessive_buffer_overrun_errors", "link_in", "its receive buffer overran"),
    _infiniband(
        "port_rcv_remote_physical_errors", "link_elsewhere", "packets came in that a link further away damaged"
    ),
    _infiniband("out_of_sequence", "loss_in", "packets to it were lost or overtaken"),
    _infiniband("duplicate_request", "loss_in", "requests to it came twice, so an answer was lost or late"),
    _infiniband("packet_seq_err", "loss_out", "receivers missed packets that it sent"),
    _infiniband("implied_nak_seq_err", "loss_out", "answers to it were out of order"),
    _infiniband("roce_adp_retrans", "loss_out", "it sent packets again"),
    _infiniband("roce_adp_retrans_to", "loss_out", "it sent packets again after a time-out"),
    _infiniband("local_ack_timeout_err", "unreachable", "peers did not acknowledge in time", silence_tells=True),
    _infiniband(
        "req_transport_retries_exceeded", "unreachable", "it gave up sending after all retries", silence_tells=True
    ),
    _infiniband("rnr_nak_retry_err", "peer_not_ready", "receivers had no buffer ready"),
    _infiniband("out_of_buffer", "cannot_absorb", "it had no buffer ready for what arrived"),
    _infiniband("rx_icrc_encapsulated", "corruption", "packets arrived with a wrong checksum"),
    _state("infiniband/*/is_down", "down", "the port is not active"),
    _state("infiniband/*/lacks_roce_v2", "unreachable", "the port has no RoCE v2 address"),
)
_ETHERNET = (
    _nic("ethtool/*/rx_*_pause", "congested_ahead", "the network told it to pause", silence_tells=True),
    _nic("ethtool/*/tx_*_pause", "cannot_absorb", "it told the network to pause", silence_tells=True),
    _nic("ethtool/*/rx_discards_phy", "cannot_absorb", "the NIC dropped what arrived, for want of buffers"),
    _nic("ethtool/*/rx_prio*_buf_discard", "cannot_absorb", "the NIC dropped what arrived, for want of buffers"),
    _nic("ethtool/*/rx_out_of_buffer", "cannot_absorb", "it had no buffer ready for what arrived"),
    _nic("ethtool/*/outbound_pci_stalled_*", "cannot_absorb", "the NIC waited for the PCIe bus"),
    _nic("ethtool/*/rx_crc_errors_phy", "link_in", "damaged frames came in"),
    _nic("ethtool/*/rx_symbol_err_phy", "link_in", "damaged symbols came in"),
    # Fast links correct bits all the time; only many more than others' is a sign.
    Signal(
        pattern="ethtool/*/rx_corrected_bits_phy",
        meaning="link_in",
        says="its cable needed that many corrections",
        only_beside_others=True,
    ),
    _nic("ethtool/*/link_down_events_phy", "link", "its link went down"),
    _nic("net/*/carrier_down_count", "link", "its link went down"),
    _nic("net/*/rx_crc_errors", "link_in", "damaged frames came in"),
    _nic("net/*/rx_missed_errors", "cannot_absorb", "the NIC dropped what arrived, for want of buffers"),
    _nic("net/*/tx_carrier_errors", "link", "its link failed while it sent"),
    _state("net/*/is_down", "down", "the port is down"),
    _nic("softnet/host/dropped", "cannot_absorb", "the kernel dropped what arrived, its queue being full"),
    # A shaped or slow device drops as a matter of course: TCP fills the queue until it does.
    Signal(
        pattern="qdisc/*/drops",
        meaning="own_queue",
        says="its own queue dropped packets, being given more than its link carries",
        only_beside_others=True,
    ),
)
_PROTOCOLS = (
    _tcp("RetransSegs", "loss_out", "it sent them again"),
    _tcp("TCPTimeouts", "loss_out", "nothing was acknowledged for a while"),
    _tcp("TCPLostRetransmit", "loss_out", "what it sent again was lost again"),
    _tcp("TCPOFOQueue", "loss_in", "segments to it were lost or overtaken", share_of="InSegs"),
    _tcp("TCPDeliveredCE", "congested_ahead", "a full queue marked what it sent"),
    _nic("ip/host/InCEPkts", "congested_before", "a full queue marked packets to it"),
    _nic("tcp/host/TCPRcvQDrop", "cannot_absorb", "its programs read too slowly"),
    _nic("tcp/host/TCPBacklogDrop", "cannot_absorb", "its programs read too slowly"),
    _nic("tcp/host/PruneCalled", "cannot_absorb", "it ran out of memory for what arrived"),
    _nic("udp/host/RcvbufErrors", "cannot_absorb", "its programs read too slowly"),
    _nic("*/host/InCsumErrors", "corruption", "packets arrived with a wrong checksum"),
)
_HOST = (
    _nic("cgroup/*/throttled_s", "throttled", "its CPU quota held it back", silence_tells=True),
    _nic("cpu/host/thermal_throttle_events", "throttled", "heat held its processor back", silence_tells=True),
    Signal(
        pattern="cpu/host/steal_s",
        meaning="throttled",
        says="other virtual machines had its processor",
        only_beside_others=True,
    ),
    # A GPU at work may well run at its power limit; the other reasons are faults wherever they hold.
    _state("gpu/*/power_cap", "throttled", "power limits its GPU's clock"),
    _state("gpu/*/hw_slowdown", "throttled", "its GPU's clock is held back", is_fault=True),
    _state("gpu/*/sw_thermal_slowdown", "throttled", "heat holds its GPU's clock back", is_fault=True),
    _state("gpu/*/hw_thermal_slowdown", "throttled", "heat holds its GPU's clock back", is_fault=True),
    _state("gpu/*/power_brake", "throttled", "its power supply holds its GPU back", is_fault=True),
    _nic("nvlink/*/*", "link", "its GPUs' own links erred"),
)
SIGNALS: tuple[Signal, ...] = (*_INFINIBAND, *_ETHERNET, *_PROTOCOLS, *_HOST)


def _reading(
    supports: Collection[Meaning], contradicts: Collection[Meaning], expects: Collection[Meaning] = ()
) -> Reading:
    return Reading(supports=frozenset(supports), contradicts=frozenset(contradicts), expects=frozenset(expects))


# A host that is held back slows its own traffic as well: throttling speaks against every fault of a network. Back-pressure
# from the network says that the link itself would take more; a link that errs harms every path over it, not one.
READINGS: dict[Kind, Reading] = {
    "slow_host": _reading({"throttled", "cannot_absorb"}, set(), {"throttled"}),
    "slow_sender": _reading({"link", "loss_out", "own_queue"}, {"congested_ahead", "throttled"}),
    "slow_receiver": _reading(
        {"link", "link_in", "loss_in", "cannot_absorb", "congested_before", "corruption"}, {"throttled"}
    ),
    "slow_link": _reading(
        {"link", "link_in", "loss_out", "loss_in", "own_queue", "corruption"}, {"congested_ahead", "throttled"}
    ),
    "bad_path": _reading({"loss_out", "loss_in", "link_elsewhere"}, {"link", "link_in", "throttled"}),
    "congested_uplink": _reading(
        {"congested_ahead", "congested_before", "loss_out", "loss_in"},
        {"link", "link_in", "cannot_absorb", "throttled"},
        {"congested_ahead", "congested_before"},
    ),
    "missing_rank": _reading({"down", "unreachable"}, set()),
    "mismatched_collective": _reading(set(), {"down", "unreachable"}),
    "transport_fault": _reading({"down", "unreachable", "link", "peer_not_ready"}, set(), {"unreachable"}),
}
